"""The teachers on one device.

Names are resolved on first use: code that only needs a device does not import a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov3_ray.model.local_teachers import DinoV3Teacher, TransformersTeacher, open_teacher

__all__ = ["DinoV3Teacher", "TransformersTeacher", "open_teacher"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'dinov3_ray.model' has no attribute {name!r}")
    value = getattr(import_module("dinov3_ray.model.local_teachers"), name)
    globals()[name] = value
    return value
