"""What a model directory says: its architecture, its preprocessing and its weight files. Needs no torch."""

from dinov3_ray.config.config import Backend, CompileChoice, CompileMode, ComputeDtype, DinoV3Config, ModelConfig
from dinov3_ray.config.transformers_model import TransformersConfig, open_config

__all__ = [
    "Backend",
    "CompileChoice",
    "CompileMode",
    "ComputeDtype",
    "DinoV3Config",
    "ModelConfig",
    "TransformersConfig",
    "open_config",
]
