"""The control plane of a pool: which replicas there shall be, and which there are."""
