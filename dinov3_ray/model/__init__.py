"""The teacher on one device.

Names are resolved on first use: code that only needs a device does not import transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov3_ray.model.dinov3 import DinoV3Teacher
    from dinov3_ray.model.transformers_teacher import TransformersTeacher, open_teacher

__all__ = ["DinoV3Teacher", "TransformersTeacher", "open_teacher"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'dinov3_ray.model' has no attribute {name!r}")
    home = "dinov3" if name == "DinoV3Teacher" else "transformers_teacher"
    value = getattr(import_module(f"dinov3_ray.model.{home}"), name)
    globals()[name] = value
    return value
