"""All that a student's loop needs to distil: :class:`Distiller`, the tap, the losses and their weight in one object."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.training.boxes import Boxes
from dinov3_ray.training.losses.gradient_share import GradientShare, SplitGradient
from dinov3_ray.training.losses.schedule import WeightSchedule
from dinov3_ray.training.losses.terms import WeightedTerms
from dinov3_ray.training.taps import FeatureTap, Select

__all__ = ["Distiller"]


class Distiller(nn.Module):
    """The distillation loss of a student's tapped layers, with its weight; a recipe makes it for a student.

    ::

        distiller = recipes.get("rtdetrv4").for_student(student, teacher, images)
        optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()])
        with distiller.tap:
            for batch, targets in prefetch(teacher, loader, recipe="rtdetrv4", device=device):
                loss = detection_loss(student(batch["img"]), batch) + distiller(targets)

    Its parameters are the projectors: give them to the optimizer. Its ``state_dict`` holds them, the weight as it was
    found, the progress of the schedule, and the teacher's statistics. Under DDP, put it inside the module that DDP
    wraps, so that the projectors' gradients are averaged, or average them yourself; the weight is the same on all
    ranks in either case.

    In eval mode, or without gradients, a call counts for nothing: the weight stays as it is.

    While the schedule's factor is 0, such as behind its end, a call gives 0, and does not look at the targets; the
    teacher computes them nevertheless, where the loop asks for them.

    Args:
        student: the model that is tapped; it is not a part of this module.
        terms: the losses.
        spec: what they compare with, as the teacher is asked for it.
        select: as in :class:`~dinov3_ray.training.taps.FeatureTap`.
        image_size: the teacher's input that the recipe means: ``input`` or ``input/2``; None if it does not matter.
        weight: of the sum of the terms; where ``share`` is given, that of the first step.
        share: the share of the gradient at the tapped tensors that the distillation should have; None keeps ``weight``.
        schedule: a factor of the weight over the course of the training; None is 1 throughout.
    """

    def __init__(
        self,
        student: nn.Module,
        terms: WeightedTerms,
        spec: FeatureSpec,
        *,
        select: Select | Mapping[str, Select] | None = None,
        image_size: str | None = None,
        weight: float = 1.0,
        share: float | None = None,
        schedule: WeightSchedule | None = None,
    ) -> None:
        super().__init__()
        if not 0 < weight < float("inf"):
            raise ConfigError(f"weight must be more than 0; got {weight}")
        of_layers = dict(select) if isinstance(select, Mapping) else dict.fromkeys(terms.layers, select)
        self.share = None if share is None else GradientShare(share, weight=weight)
        self._later = {name: _Later(each, self.share) for name, each in of_layers.items() if callable(each)}
        self._select = {name: self._later.get(name, each) for name, each in of_layers.items() if each is not None}
        self.tap = FeatureTap(student, terms.layers, select=self._select)
        self.terms = terms
        self.spec, self.image_size = spec, image_size
        self._weight = float(weight)
        self.schedule = schedule or WeightSchedule()
        self._progress = {"step": 0, "epoch": 0}

    @property
    def weight(self) -> float:
        """What the sum of the terms is multiplied with now; on an accelerator, the look waits for it."""
        weight = self._weight if self.share is None else float(self.share.weight)
        return weight * self.schedule.factor(self._progress[self.schedule.unit])

    def tap_on(self, student: nn.Module) -> None:
        """Tap another module of the same layers from now on, such as the student when it is made anew; attach it."""
        self.tap.close()
        self.tap.clear()
        self.tap = FeatureTap(student, self.terms.layers, select=self._select)

    @torch.no_grad()
    def settle(self, targets: Features | Mapping[str, Features]) -> None:
        """Let lazy projectors take their channels from what the tap holds; it stays there, and nothing is counted."""
        self.terms({name: self._ended(name, self.tap[name]) for name in self.tap.names}, targets)

    def set_epoch(self, epoch: int) -> None:
        """Tell the schedule the number of the epoch that begins, from 0, as a sampler is told."""
        self._progress["epoch"] = int(epoch)  # of a part of an epoch, as transformers counts, the whole

    def fit_statistics(self, targets: Iterable[Features | Mapping[str, Features]]) -> None:
        """Standardise the teachers' features by their statistics in ``targets``, where the recipe does so (PHI-S).

        Otherwise, those of the first batch are taken: see :class:`~dinov3_ray.training.losses.PhiS`.

        Args:
            targets: as the loop gets them, of some batches: for a map some thousand locations, for CLS vectors as many
                images.
        """
        batches = list(targets)
        fitted: set[int] = set()
        for term in self.terms.terms:
            statistics = term.loss.standardise
            if statistics is None or id(statistics) in fitted:
                continue
            fitted.add(id(statistics))
            statistics.fit(term.loss.target_of(self.terms.targets_of(term, each)) for each in batches)

    def forward(self, targets: Features | Mapping[str, Features], boxes: Boxes | Tensor | None = None) -> Tensor:
        """What to add to the task's loss, a scalar; the tap forgets the outputs that it is of.

        Args:
            targets: of the batch that the student has just computed; of each teacher, by name, if there are several.
            boxes: where the objects are; see :class:`~dinov3_ray.training.losses.DistillationLoss`.

        Raises:
            InputError: the tap has no outputs (attach it: ``with distiller.tap:``), or targets do not fit them.
        """
        outputs = self.tap.take_all()
        factor = self.schedule.factor(self._progress[self.schedule.unit])
        learning = self.training and torch.is_grad_enabled()
        weight: float | Tensor = self._weight * factor
        if self.share is not None:
            weight = self.share.weight * factor  # a copy: the backward pass changes the original
            self.share.begin()
            if learning and factor:
                self.share.expect()
                outputs = {name: self._watched(name, each, self.share, weight) for name, each in outputs.items()}
        if factor:
            loss: Tensor = weight * self.terms(
                {name: self._ended(name, outputs[name]) for name in outputs}, targets, boxes
            )
        else:
            loss = self._nothing(outputs)
        if learning:
            self._progress["step"] += 1
        return loss

    def _watched(self, name: str, output: Tensor, share: GradientShare, weight: Tensor) -> Tensor:
        if name in self._later and self._later[name].measures(weight):
            return output
        return share.watch(output, weight)

    def _nothing(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """0, of which all that learns gets a gradient of 0, as DDP needs it; no value is looked at, not even NaN."""
        parts = [*outputs.values(), *(each for each in self.parameters() if not is_lazy(each))]
        empty = [each.flatten()[:0].float().sum() for each in parts]
        return torch.stack([each.to(empty[0].device) for each in empty]).sum()

    def _ended(self, name: str, output: Tensor) -> Tensor:
        return self._later[name].end(output) if name in self._later else output

    def get_extra_state(self) -> Tensor:
        """The progress of the schedule, for ``state_dict()``: int64 [2], of steps and epochs."""
        return torch.tensor([self._progress["step"], self._progress["epoch"]])

    def set_extra_state(self, state: Any) -> None:
        """Take the progress of the schedule from a ``state_dict``."""
        self._progress["step"], self._progress["epoch"] = state.tolist()

    def extra_repr(self) -> str:
        return f"layers={', '.join(self.tap.names)}, spec={self.spec}, image_size={self.image_size}"


class _Later:
    """A select function that works on an alias of a layer's output, by which the share is measured.

    The task's gradient arrives at what the layer gave, and not at what the function makes of it. Where that is a
    tensor, the function waits for its alias; else, it gets the output with aliases of the tensors in it.
    """

    def __init__(self, function: Callable[[Any], Tensor], share: GradientShare | None) -> None:
        self._function, self._share = function, share
        self._waits = False
        self._splits: list[SplitGradient] = []

    def __call__(self, output: Any) -> Tensor:
        self._waits, self._splits = isinstance(output, Tensor), []
        if isinstance(output, Tensor):
            return output
        return self._function(output if self._share is None else _replaced(output, self._alias))

    def _alias(self, tensor: Tensor) -> Tensor:
        assert self._share is not None
        if not tensor.requires_grad:
            return tensor
        self._splits.append(SplitGradient(self._share))
        return self._splits[-1].alias(tensor)

    def measures(self, weight: Tensor) -> bool:
        """Whether there are aliases already; those count from now on."""
        for split in self._splits:
            split.factor = weight.detach()
        return bool(self._splits)

    def end(self, output: Tensor) -> Tensor:
        if not self._waits:
            return output
        chosen = self._function(output)
        if not isinstance(chosen, Tensor):
            raise InputError(f"select must give a tensor; got a {type(chosen).__name__}")
        return chosen

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _Later, (self._function, self._share)  # without what belongs to a batch


def _replaced(output: Any, by: Callable[[Tensor], Tensor]) -> Any:
    """A copy of ``output`` with another tensor for each in its tuples, lists and dicts, such as a ``ModelOutput``."""
    if isinstance(output, Tensor):
        return by(output)
    if isinstance(output, MutableMapping):
        copied = copy.copy(output)
        for key, value in output.items():
            copied[key] = _replaced(value, by)
        return copied
    if isinstance(output, (list, tuple)):
        values = [_replaced(each, by) for each in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return output
