"""A student's distance from its teacher, with grids and channels aligned: :class:`DistillationLoss`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.features import Features, resample_map
from dinov3_ray.training.boxes import Boxes
from dinov3_ray.training.learning import LearningWatch
from dinov3_ray.training.losses.distances import (
    cosine_loss,
    gram_loss,
    mse_loss,
    queue_loss,
    relation_loss,
    smooth_l1_loss,
)
from dinov3_ray.training.losses.phi_s import PhiS
from dinov3_ray.training.losses.projectors import make_projector

__all__ = ["ClsLossKind", "DistillationLoss", "LossKind", "TeacherQueue"]

ClsLossKind = Literal["cls_cosine", "cls_mse", "cls_queue"]
LossKind = Literal["cosine", "mse", "smooth_l1", "gram", "relation", ClsLossKind]

_ALIKE_IN_CHANNELS = ("gram", "relation")  # kinds that compare locations with one another need no common channels


class TeacherQueue(nn.Module):
    """The teacher's CLS vectors of this batch and of those before, of unit length; what ``cls_queue`` compares with.

    Each process has its own, as in LightlyTrain, whose queue begins with zeros, too. Only where
    DistributedDataParallel wraps it, all ranks get the first one's before each forward pass, since it is a buffer: keep
    it outside, or pass DDP ``broadcast_buffers=False``, and each rank has its own there, too.

    Args:
        size: Q, images that it holds.
        channels: D.
    """

    rows: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        if min(size, channels) < 1:
            raise ConfigError(f"size and channels must be at least 1; got {size} and {channels}")
        self.register_buffer("rows", torch.zeros(size, channels))  # [Q, D]

    @torch.no_grad()
    def push(self, vectors_BD: Tensor) -> None:
        """Put the vectors of a batch first; the oldest drop out."""
        unit_BD = F.normalize(vectors_BD.to(self.rows.dtype), dim=1)
        self.rows = torch.cat([unit_BD, self.rows])[: len(self.rows)]


class DistillationLoss(nn.Module):
    """The distance of a student's map (or CLS vector) from the teacher's, with grids and channels aligned.

    ::

        distill = DistillationLoss("cosine", projector=cfg.hidden_size, object_weight=1.0, background_weight=0.1)
        for batch, targets in remote.prefetch(loader, FeatureSpec(feature_map=True)):
            ...
            loss = detection_loss + 0.5 * distill(student_map, targets, Boxes.from_ultralytics(batch))

    With a projector it has parameters. Give them to the optimizer and keep them in the checkpoint. Under DDP, put this
    module inside the one that DDP wraps, so that their gradients are averaged too.

    In training, it warns once if the student's tensor takes no gradient, if nothing trains the projector, or if only
    boxes count and none comes.

    Args:
        kind: ``cosine``, ``mse``, ``smooth_l1``, ``gram`` or ``relation`` on maps; ``cls_cosine``, ``cls_mse`` or
            ``cls_queue`` on CLS vectors. The functions of :mod:`~dinov3_ray.training.losses.distances` say what they
            are. Or several of either, each with a weight, ``{"cosine": 0.9, "smooth_l1": 0.1}``, which share the
            projector.
        projector: None if the student has the teacher's channels (``gram`` and ``relation`` need none in any case); an
            int D for a new :func:`make_projector` to D channels; or any module from C to D channels. Under autocast it
            computes in autocast's precision.
        align: on whose grid the maps are compared. ``student`` resamples the teacher's map; ``teacher`` resamples the
            student's, which is cheaper where the student's grid is finer (before the projector, which is cheaper; a
            linear one gives the same either way). Area pooling down, bilinear up.
        object_weight: weight of a location that shows an object, when boxes are given.
        background_weight: weight of all other locations, also in images without objects. With 1 and 0.1, a background
            location counts a tenth of an object's location, however many there are of each.
        layer: take the teacher's map of this block (a key of ``Features.layers``) and not the final one.
        beta: of ``smooth_l1``.
        per_image: of ``gram``.
        temperature: of ``relation`` and ``cls_queue``.
        queue: of ``cls_queue``.
        standardise: statistics of the teacher, by which its features are standardised before they are compared.

    Raises:
        ConfigError: names the option, the rule and the value.
    """

    def __init__(
        self,
        kind: LossKind | Mapping[LossKind, float] = "cosine",
        *,
        projector: nn.Module | int | None = None,
        align: Literal["student", "teacher"] = "student",
        object_weight: float = 1.0,
        background_weight: float = 1.0,
        layer: int | None = None,
        beta: float = 1.0,
        per_image: bool = True,
        temperature: float = 0.07,
        queue: TeacherQueue | None = None,
        standardise: PhiS | None = None,
    ) -> None:
        super().__init__()
        kinds = {kind: 1.0} if isinstance(kind, str) else dict(kind)
        if not kinds or not set(kinds) <= set(get_args(LossKind)) or not min(kinds.values()) > 0:
            raise ConfigError(
                f"kind must be one of {', '.join(get_args(LossKind))}; or several, each with a weight above 0; "
                f"got {kind!r}"
            )
        on_cls = {each in get_args(ClsLossKind) for each in kinds}
        if len(on_cls) > 1:
            raise ConfigError(f"kind must name losses on maps, or on CLS vectors, not both; got {kind!r}")
        if align not in ("student", "teacher"):
            raise ConfigError(f"align must be 'student' or 'teacher'; got {align!r}")
        if min(object_weight, background_weight) < 0 or object_weight + background_weight <= 0:
            raise ConfigError(
                "object_weight and background_weight must be at least 0, one of them more; "
                f"got {object_weight} and {background_weight}"
            )
        if not beta > 0:
            raise ConfigError(f"beta must be more than 0; got {beta} (kind='mse' is the quadratic loss)")
        if not temperature > 0:
            raise ConfigError(f"temperature must be more than 0; got {temperature}")
        if (queue is not None) != ("cls_queue" in kinds):
            raise ConfigError(f"queue must be a TeacherQueue for kind 'cls_queue', and None for others; got {queue!r}")
        self.kinds: dict[LossKind, float] = kinds
        self.on_cls = on_cls == {True}
        if self.on_cls and layer is not None:
            raise ConfigError(
                f"layer must be None for kind {self.kind!r}: a block has a map but no CLS here; got {layer}"
            )
        self.align = align
        self.object_weight, self.background_weight = float(object_weight), float(background_weight)
        self.layer = layer
        self.beta, self.per_image, self.temperature = float(beta), per_image, float(temperature)
        self.queue, self.standardise = queue, standardise
        if projector is not None and not isinstance(projector, (int, nn.Module)):
            raise ConfigError(f"projector must be None, a number of channels or a module; got {projector!r}")
        self.projector = make_projector(projector, vectors=self.on_cls) if isinstance(projector, int) else projector
        self._watch = LearningWatch()

    def forward(self, student: Tensor, teacher: Features | Tensor, boxes: Boxes | Tensor | None = None) -> Tensor:
        """The loss, a scalar of at least float32.

        Args:
            student: [B, C, h, w], or [B, C] for a CLS kind; gradients go here (and to the projector) only.
            teacher: the targets as they came from a teacher, or the one tensor itself: [B, D, h', w'] or [B, D].
            boxes: where the objects are; or the same as a mask [B, h, w] on the grid of comparison, bool or float in
                0..1 (float mixes the two weights). With None, all locations have the same weight.

        Raises:
            InputError: for tensors that cannot be compared.
        """
        target = self.target_of(teacher)
        self._check(student, target)
        if self.standardise is not None:
            target = self.standardise(target)
        if self.training:
            self._watch_student(student, teacher)
        if self.on_cls:
            if boxes is not None:
                raise InputError(f"boxes must be None for kind {self.kind!r}: a CLS vector has no locations")
        elif self.align == "teacher":
            student = resample_map(student, (target.shape[2], target.shape[3]))
        else:
            # Widened first: a mean of bfloat16 values should not be rounded to bfloat16.
            wide = torch.promote_types(target.dtype, torch.float32)
            target = resample_map(target.to(wide), (student.shape[2], student.shape[3]))
        if self.projector is not None:
            projected = self.projector(student)
            if self.training:
                self._watch_projected(student, projected)
            student = projected
        if student.shape[1] != target.shape[1] and not set(self.kinds) <= set(_ALIKE_IN_CHANNELS):
            raise InputError(
                f"student and teacher must have the same channels; got {student.shape[1]} and {target.shape[1]} "
                f"(pass projector={target.shape[1]} to DistillationLoss)"
            )
        if self.training and isinstance(boxes, Boxes) and not self.background_weight:
            self._watch.objects(len(boxes))
        weights = None if boxes is None else self._weights(boxes, student)
        compared = [weight * self._compare(kind, student, target, weights) for kind, weight in self.kinds.items()]
        return sum(compared[1:], compared[0])

    @property
    def kind(self) -> str:
        """The kind, or all of them with their weights, as people write it."""
        if len(self.kinds) == 1:
            return next(iter(self.kinds))
        return " + ".join(f"{weight:g} {kind}" for kind, weight in self.kinds.items())

    def _watch_student(self, student: Tensor, teacher: Features | Tensor) -> None:
        swapped = isinstance(teacher, Tensor) and teacher.requires_grad
        self._watch.gradient(
            student,
            "the student's tensor takes no gradient, so that the student learns nothing from this loss: "
            + (
                "the teacher's does, as if they were swapped (the student comes first)"
                if swapped
                else "the layers that it comes from are frozen, ran under no_grad or in a reentrant checkpoint, or it "
                "was detached (unfreeze them, take another layer's output, or checkpoint with use_reentrant=False)"
            ),
        )

    def _watch_projected(self, student: Tensor, projected: Tensor) -> None:
        assert self.projector is not None
        if student.requires_grad:
            self._watch.gradient(
                projected,
                "the projector's output takes no gradient, while its input does, so that the student learns nothing "
                "from this loss (the projector must not run under no_grad, or detach)",
            )
        self._watch.projector(self.projector)

    def _compare(self, kind: LossKind, student: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        match kind:
            case "cosine" | "cls_cosine":
                return cosine_loss(student, target, weights)
            case "mse" | "cls_mse":
                return mse_loss(student, target, weights)
            case "smooth_l1":
                return smooth_l1_loss(student, target, weights, beta=self.beta)
            case "gram":
                return gram_loss(student, target, weights, per_image=self.per_image)
            case "relation":
                return relation_loss(student, target, weights, temperature=self.temperature)
            case "cls_queue":
                assert self.queue is not None
                if self.training:
                    self.queue.push(target)
                return queue_loss(student, target, self.queue.rows, temperature=self.temperature)

    def target_of(self, teacher: Features | Tensor) -> Tensor:
        """The tensor that this loss compares with.

        Raises:
            InputError: the targets do not hold it.
        """
        if isinstance(teacher, Tensor):
            return teacher.detach()
        if self.layer is not None:
            name, found = f"layers=({self.layer},)", teacher.layers.get(self.layer)
        elif self.on_cls:
            name, found = "cls=True", teacher.cls
        else:
            name, found = "feature_map=True", teacher.feature_map
        if found is None:
            raise InputError(f"teacher must hold what the loss compares; got {teacher!r} (ask for FeatureSpec({name}))")
        return found.detach()

    def _check(self, student: Tensor, target: Tensor) -> None:
        shape = "[B, D]" if self.on_cls else "[B, D, h, w]"
        for name, tensor in (("student", student), ("teacher", target)):
            if tensor.ndim != (2 if self.on_cls else 4) or not tensor.is_floating_point():
                raise InputError(
                    f"{name} must be a floating-point tensor {shape} for kind {self.kind!r}; "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        if len(student) != len(target):
            raise InputError(
                f"student and teacher must have the same images; got {len(student)} and {len(target)} of them"
            )
        if student.device != target.device:
            raise InputError(
                f"student and teacher must be on one device; got {student.device} and {target.device} "
                "(prefetch(..., device=...) delivers targets there without a wait)"
            )

    def _weights(self, boxes: Boxes | Tensor, compared: Tensor) -> Tensor:
        batch, _, height, width = compared.shape
        if isinstance(boxes, Boxes):
            boxes.require_images(batch)
            mask_Bhw = boxes.to(compared.device, non_blocking=True).mask(batch, (height, width))
        else:
            mask_Bhw = boxes
        if mask_Bhw.shape != (batch, height, width) or mask_Bhw.device != compared.device:
            raise InputError(
                f"a mask must be [B, h, w] = {[batch, height, width]} on {compared.device}; "
                f"got {list(mask_Bhw.shape)} on {mask_Bhw.device}"
            )
        mask_Bhw = mask_Bhw.to(torch.promote_types(compared.dtype, torch.float32))
        return self.background_weight + (self.object_weight - self.background_weight) * mask_Bhw

    def extra_repr(self) -> str:
        weights = f"object_weight={self.object_weight}, background_weight={self.background_weight}"
        return f"{self.kind!r}, align={self.align!r}, {weights}, layer={self.layer}"
