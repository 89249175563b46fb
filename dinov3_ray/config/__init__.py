"""What a model directory says: its architecture, its preprocessing and its weight files. Needs no torch."""

from dinov3_ray.config.config import CompileMode, ComputeDtype, DinoV3Config

__all__ = ["CompileMode", "ComputeDtype", "DinoV3Config"]
