"""What a model directory says: its architecture, its preprocessing and its weight files. Needs no torch."""

from dinov3_ray.config.config import ComputeDtype, DinoV3Config

__all__ = ["ComputeDtype", "DinoV3Config"]
