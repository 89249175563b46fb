"""A frozen DINOv3 teacher, local or served by a pool of Ray actors.

Names are resolved on first use, so that the local teacher never imports Ray and ``--help`` never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov3_ray.config import DinoV3Config
    from dinov3_ray.features import Features, FeatureSpec
    from dinov3_ray.model import DinoV3Teacher
    from dinov3_ray.pool.client.remote import RemoteTeacher
    from dinov3_ray.pool.teacher_pool import TeacherPool

__all__ = ["DinoV3Config", "DinoV3Teacher", "FeatureSpec", "Features", "RemoteTeacher", "TeacherPool"]
__version__ = "0.1.0"

_HOMES = {
    "DinoV3Config": "dinov3_ray.config",
    "DinoV3Teacher": "dinov3_ray.model",
    "FeatureSpec": "dinov3_ray.feature_spec",
    "Features": "dinov3_ray.features",
    "RemoteTeacher": "dinov3_ray.pool.client.remote",
    "TeacherPool": "dinov3_ray.pool.teacher_pool",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dinov3_ray' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
