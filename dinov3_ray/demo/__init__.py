"""``dinov3-ray demo``: a small student learns from a pool of teachers, on any machine, in about a minute."""
