"""Several losses in one: :class:`WeightedTerms`, the sum of the terms of a student's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.features import Features
from dinov3_ray.training.boxes import Boxes
from dinov3_ray.training.losses.distillation_loss import DistillationLoss

__all__ = ["Term", "WeightedTerms"]


@dataclass(frozen=True, slots=True)
class Term:
    """One summand: how far a layer of the student is from a teacher, and how much that counts.

    Attributes:
        layer: the student's layer, by name. Several terms may compare the same layer.
        loss: the distance, with its projector.
        weight: its factor in the sum, more than 0.
        teacher: the name of the teacher, where targets come from several.
    """

    layer: str
    loss: DistillationLoss
    weight: float = 1.0
    teacher: str | None = None


class WeightedTerms(nn.Module):
    """Σ w·l over terms: losses of several kinds, of several layers of the student, with several teachers.

    Args:
        terms: at least one; each with a loss of its own, since a projector is trained for one layer.

    Raises:
        ConfigError: no term, or a weight that is not a number above 0.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        if not terms:
            raise ConfigError("terms must hold at least one; got none")
        for term in terms:
            if not 0 < term.weight < float("inf"):
                raise ConfigError(f"weight must be more than 0; got {term.weight} for layer {term.layer!r}")
        self.terms = tuple(terms)
        self.losses = nn.ModuleList(term.loss for term in terms)

    @property
    def layers(self) -> tuple[str, ...]:
        """The student's layers that are compared, each once."""
        return tuple(dict.fromkeys(term.layer for term in self.terms))

    def forward(
        self,
        outputs: Mapping[str, Tensor],
        targets: Features | Mapping[str, Features],
        boxes: Boxes | Tensor | None = None,
    ) -> Tensor:
        """Σ w·l, a scalar of at least float32.

        Args:
            outputs: [B, C, h, w] or [B, C] of each layer, by name; a map is averaged over its locations where a term
                compares CLS vectors.
            targets: of the teacher; or of each, by name, where the terms name teachers.
            boxes: where the objects are, for the terms that compare maps.
        """
        summed = []
        for term, loss in zip(self.terms, self.losses, strict=True):  # a copy's losses are in the ModuleList
            # Widened, so that a student in half precision meets a projector in float32.
            output = outputs[term.layer]
            output = output.to(torch.promote_types(output.dtype, torch.float32))
            if loss.on_cls and output.ndim == 4:
                output = output.mean((2, 3))
            summed.append(term.weight * loss(output, self.targets_of(term, targets), None if loss.on_cls else boxes))
        return torch.stack(summed).sum()

    @staticmethod
    def targets_of(term: Term, targets: Features | Mapping[str, Features]) -> Features:
        """Those of the term's teacher.

        Raises:
            InputError: they are not among ``targets``.
        """
        if isinstance(targets, Features):
            if term.teacher is None:
                return targets
            raise InputError(f"targets must be a dict of those of each teacher, {term.teacher!r} among them; got one's")
        if term.teacher is None or term.teacher not in targets:
            wanted = "of one teacher, and no dict" if term.teacher is None else f"those of {term.teacher!r}, too"
            raise InputError(f"targets must be {wanted}; got a dict with {', '.join(targets) or 'nothing in it'}")
        return targets[term.teacher]

    def extra_repr(self) -> str:
        return ", ".join(f"{term.weight:g} * {term.loss.kind} of {term.layer}" for term in self.terms)
