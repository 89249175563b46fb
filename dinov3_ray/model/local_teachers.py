"""The local teachers: of DINOv3, of other vision models of transformers, and of whichever a directory holds."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from dinov3_ray.config import DinoV3Config, ModelConfig, TransformersConfig, open_config
from dinov3_ray.model.device import parse_device
from dinov3_ray.model.frozen_teacher import FrozenTeacher

__all__ = ["DinoV3Teacher", "TransformersFactory", "TransformersTeacher", "open_teacher"]


class DinoV3Teacher(FrozenTeacher):
    """A frozen DINOv3; see :class:`~dinov3_ray.model.frozen_teacher.FrozenTeacher`.

    Args:
        config: what to load and how; a path, or a hub id, is taken for ``DinoV3Config(path)``.
        device: where to compute, as a torch.device or its name.
    """

    def __init__(self, config: DinoV3Config | str | PathLike[str], device: torch.device | str = "cpu") -> None:
        super().__init__(DinoV3Config.of(config), device)


class TransformersTeacher(FrozenTeacher):
    """A frozen vision model of transformers; see :class:`~dinov3_ray.model.frozen_teacher.FrozenTeacher`.

    ``cls``, ``registers`` and ``feature_map`` are parts of transformers' ``last_hidden_state``, and ``layers`` of its
    ``hidden_states``, bit for bit in float32 on the same pixels; ``norm`` applies the model's final norm to layers, if
    its last hidden state has one (CLIP's does not). What the model does not have, such as SigLIP's CLS, is a SpecError.

    Args:
        config: a model directory, or its configuration.
        device: where to compute, as a torch.device or its name.
        options: those of :class:`~dinov3_ray.config.config.ModelOptions`, for a directory; ``dtype`` may be torch's.

    Raises:
        ConfigError: the model's tokens are not patches, its files are wrong, or an option or ``device`` is.
        CheckpointError: the weights are missing, damaged, or not what the configuration says.
    """

    def __init__(
        self,
        config: TransformersConfig | str | PathLike[str],
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(_configured(config, options), device)

    @classmethod
    def factory(
        cls,
        config: TransformersConfig | str | PathLike[str],
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> TransformersFactory:
        """What ``TeacherPool.start`` and ``extract`` take, picklable; the model's files are read at once.

        Args:
            device: None is the one that each replica has. Whether a replica has another one, it finds out itself.
            config, options: as for the teacher itself.
        """
        named = None if device is None else str(parse_device(device))
        return TransformersFactory(_configured(config, options), named)


@dataclass(frozen=True, slots=True)
class TransformersFactory:
    """Makes teachers of ``config`` on ``device``."""

    config: TransformersConfig
    device: str | None = None

    @property
    def stands_for(self) -> TransformersConfig | None:
        """The configuration, which a pool takes in the place of this factory if that names no device."""
        return self.config if self.device is None else None

    def __call__(self) -> TransformersTeacher:
        if self.device is not None:
            return TransformersTeacher(self.config, self.device)
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return TransformersTeacher(self.config, accelerator or "cpu")


def open_teacher(
    config: ModelConfig | str | PathLike[str], device: torch.device | str = "cpu", **options: Any
) -> FrozenTeacher:
    """The teacher of a model directory or its configuration: a DinoV3Teacher, or else a TransformersTeacher."""
    opened = open_config(config, **options)
    if isinstance(opened, TransformersConfig):
        return TransformersTeacher(opened, device)
    assert isinstance(opened, DinoV3Config)
    return DinoV3Teacher(opened, device)


def _configured(config: TransformersConfig | str | PathLike[str], options: dict[str, Any]) -> TransformersConfig:
    if isinstance(options.get("dtype"), torch.dtype):
        options = options | {"dtype": str(options["dtype"]).removeprefix("torch.")}
    return TransformersConfig.of(config, **options)
