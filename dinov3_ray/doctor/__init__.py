"""``dinov3-ray doctor``: looks at a machine and a cluster before a pool does, and says what to do."""
