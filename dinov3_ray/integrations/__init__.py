"""Trainers that people have, with a teacher beside them."""
