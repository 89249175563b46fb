"""How requests reach replicas, and how tensors cross."""
