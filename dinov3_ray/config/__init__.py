"""What a model directory says: its architecture, its preprocessing and its weight files. Needs no torch."""

from dinov3_ray.config.config import CompileChoice, CompileMode, ComputeDtype, DinoV3Config

__all__ = ["CompileChoice", "CompileMode", "ComputeDtype", "DinoV3Config"]
