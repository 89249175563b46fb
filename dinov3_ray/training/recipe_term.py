"""One comparison of a recipe: :class:`RecipeTerm` makes the loss, once student and teacher are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dinov3_ray.errors import InputError
from dinov3_ray.features import Features
from dinov3_ray.training.losses import (
    ClsLossKind,
    DistillationLoss,
    LossKind,
    PhiS,
    ProjectorKind,
    TeacherQueue,
    make_projector,
)

__all__ = ["RecipeTerm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTerm:
    """One comparison of a recipe: a loss, before student and teacher are known.

    Attributes:
        kind: as in :class:`~dinov3_ray.training.losses.DistillationLoss`; one, or pairs of several and their weights.
        weight: in the sum of the terms.
        projector: None if the loss needs none.
        hidden: channels in the middle of the projector; None takes the teacher's.
        deviation: of the normal distribution, cut at 2, from which the projector's weights are drawn; None is torch's.
        layer: the teacher's block; None takes the final map.
        align, temperature, per_image, object_weight, background_weight: as in
            :class:`~dinov3_ray.training.losses.DistillationLoss`.
        queue: rows of the queue of ``cls_queue``.
    """

    kind: LossKind | tuple[tuple[LossKind, float], ...]
    weight: float = 1.0
    projector: ProjectorKind | None = "linear"
    hidden: int | None = None
    deviation: float | None = None
    layer: int | None = None
    align: Literal["student", "teacher"] = "student"
    temperature: float = 0.07
    per_image: bool = True
    object_weight: float = 1.0
    background_weight: float = 1.0
    queue: int = 0

    @property
    def on_cls(self) -> bool:
        """Whether it compares CLS vectors."""
        first = self.kind if isinstance(self.kind, str) else self.kind[0][0]
        return first in get_args(ClsLossKind)

    def target(self, features: Features) -> Tensor:
        """What it compares with."""
        found = features.cls if self.on_cls else features.feature_map
        if self.layer is not None:
            found = features.layers.get(self.layer)
        if found is None:
            raise InputError(f"teacher must give what the recipe asks for; got {features!r}")
        return found

    def loss(self, student: Tensor, teacher_channels: int, statistics: PhiS | None) -> DistillationLoss:
        """The loss between a student's layer, by its output, and a teacher of these channels."""
        projector = None
        if self.projector is not None:
            projector = make_projector(
                teacher_channels, student.shape[1], vectors=self.on_cls, kind=self.projector, hidden=self.hidden
            )
            for module in projector.modules():
                if self.deviation is not None and isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.trunc_normal_(module.weight, std=self.deviation)
            projector.to(torch.promote_types(student.dtype, torch.float32))  # as the terms widen what they are given
        return DistillationLoss(
            self.kind if isinstance(self.kind, str) else dict(self.kind),
            projector=projector,
            align=self.align,
            layer=self.layer,
            per_image=self.per_image,
            object_weight=self.object_weight,
            background_weight=self.background_weight,
            temperature=self.temperature,
            queue=TeacherQueue(self.queue, teacher_channels) if self.queue else None,
            standardise=statistics,
        )
