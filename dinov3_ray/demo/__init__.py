"""``dinov3-ray demo``: a student learns from a served teacher, on any machine, in about a minute."""
