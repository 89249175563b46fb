"""Opens a student by its name: which framework it belongs to, and what to do where none has it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from dinov3_ray.distillation.frameworks import (
    OpenedStudent,
    is_installed,
    near,
    open_callable,
    open_timm,
    open_transformers,
    open_ultralytics,
)
from dinov3_ray.distillation.student_backbone import IMAGENET, PLAIN
from dinov3_ray.errors import ConfigError

__all__ = ["Normalize", "open_student"]

Normalize = Literal["auto", "imagenet", "none"]
"""By whose mean and standard deviation a student's pixels are normalised; ``none`` leaves them in 0..1."""

_KINDS = (
    "timm:NAME, transformers:TYPE, a directory with config.json, a .yaml or .pt of Ultralytics, or module:function, "
    "which returns an nn.Module"
)


def open_student(
    name: str, *, pretrained: bool = False, normalize: Normalize = "auto", size: tuple[int, int] = (224, 224)
) -> OpenedStudent:
    """The student ``name``, with random weights.

    Args:
        name: ``timm:NAME``, or NAME alone where timm is installed and knows it; ``transformers:`` with a model type, a
            directory or a hub id, or a directory with config.json alone; a ``.yaml`` or ``.pt`` of Ultralytics;
            or ``module:function`` that returns an nn.Module.
        pretrained: begin with the weights that are published under the name, or are in the directory.
        normalize: ``auto`` is the framework's own: what timm or preprocessor_config.json say, else ImageNet's; none
            for Ultralytics; ImageNet's for a module of your own.
        size: (H, W) of the images that it is going to see.

    Raises:
        ConfigError: there is no such student; names what is like it, and what to do.
    """
    if normalize not in get_args(Normalize):
        raise ConfigError(f"normalize must be one of {', '.join(get_args(Normalize))}; got {normalize!r}")
    statistics = {"auto": None, "imagenet": IMAGENET, "none": PLAIN}[normalize]
    kind, colon, rest = name.partition(":")
    if kind == "timm" and colon:
        return open_timm(rest, pretrained=pretrained, statistics=statistics, size=size)
    if kind == "transformers" and colon:
        return open_transformers(rest, pretrained=pretrained, statistics=statistics, size=size)
    if name.endswith((".yaml", ".yml", ".pt")):
        return open_ultralytics(name, pretrained=pretrained, statistics=statistics, size=size)
    if Path(name).is_dir() or Path(name).name == "config.json":
        return open_transformers(name, pretrained=pretrained, statistics=statistics, size=size)
    if colon:
        return open_callable(name, pretrained=pretrained, statistics=statistics, size=size)
    if is_installed("timm"):
        return open_timm(name, pretrained=pretrained, statistics=statistics, size=size)
    from transformers import CONFIG_MAPPING  # here, since it takes seconds

    raise ConfigError(
        f"student must be {_KINDS}; got {name!r}: a plain name is timm's, which is not installed (pip install timm)."
        f"{near(name, CONFIG_MAPPING, 'transformers:')}"
    )
