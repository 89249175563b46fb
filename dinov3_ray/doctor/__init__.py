"""``dinov3-ray doctor``: checks a machine and a cluster before a pool uses them, and gives remedies."""
