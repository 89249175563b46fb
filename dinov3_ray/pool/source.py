"""What a pool serves: a DINOv3 configuration, or a factory of any teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dinov3_ray.config import DinoV3Config
from dinov3_ray.errors import ConfigError
from dinov3_ray.teacher import Extractor

__all__ = ["CheckedSource", "TeacherSource", "builder", "check_source"]

CheckedSource = DinoV3Config | Callable[[], Extractor]
TeacherSource = CheckedSource | str | Path


def check_source(source: TeacherSource) -> CheckedSource:
    """``source`` as a configuration (read and validated here and now) or a factory.

    Raises:
        ConfigError: if it is neither.
    """
    if isinstance(source, DinoV3Config):
        return source
    if isinstance(source, (str, Path)):
        return DinoV3Config(root=Path(source))
    if callable(source):
        return source
    raise ConfigError(
        "teacher must be a DinoV3Config, a checkpoint directory, or a callable without arguments that returns an "
        f"object with .extract(images, spec); got {source!r}"
    )


def builder(source: CheckedSource, device: str) -> Callable[[], Extractor]:
    """What makes the teacher on ``device`` (a factory chooses its device itself)."""

    def build() -> Extractor:
        if isinstance(source, DinoV3Config):
            # Only here: transformers takes seconds to import, and neither a client nor a factory needs it.
            from dinov3_ray.model import DinoV3Teacher

            return DinoV3Teacher(source, device)
        teacher = source()
        if not isinstance(teacher, Extractor):
            raise ConfigError(f"the factory must return an object with .extract(images, spec); got {teacher!r}")
        return teacher

    return build
