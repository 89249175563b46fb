"""The control plane of a pool: which replicas are wanted, which there are, and what to do about the difference."""
