"""Trainers and loaders that people have, with targets from a teacher."""
