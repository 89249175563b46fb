"""Ultralytics: trainers that distil from a pool, for detection and for oriented boxes.

::

    YOLO("yolo26n-obb.yaml").train(data="dota8.yaml", trainer=OBBDistillationTrainer, teacher="dinov3")

Needs the extra ``ultralytics`` (``pip install 'dinov3-ray[ultralytics]'``; it is licensed under AGPL-3.0).

The teacher gets each batch as the loader makes it for the student: letterboxed, augmented, uint8 in RGB. Ultralytics
divides by 255 later, so that there is no normalisation to undo. The loss compares one layer of the student with the
teacher's map; by default that is the neck's output at stride 16, the stride of a DINOv3 patch. Locations inside boxes
(oriented boxes too) have one weight, all others another. Ultralytics shows the loss as ``distill``, with its own.

Checkpoints are plain Ultralytics models. The projector is needed in training only: it is saved next to them as
``distill.pt``, and ``resume=True`` loads it again (give ``teacher=...`` then too).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor, nn
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import unwrap_model

from dinov3_ray.errors import ConfigError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.integrations.loader import TargetLoader
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.training.boxes import Boxes
from dinov3_ray.training.losses import DistillationLoss, LossKind
from dinov3_ray.training.prefetch import AnyTeacher, Prefetch
from dinov3_ray.training.taps import FeatureTap

__all__ = ["DetectionDistillationTrainer", "Distillation", "OBBDistillationTrainer"]

_TARGETS = "teacher"  # the key of the targets in a batch
_PATCH_STRIDE = 16
_PROJECTOR_FILE = "distill.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """The trainers' arguments besides Ultralytics' own.

    Args:
        teacher: the name of a pool; or a teacher, which must be picklable for training on several GPUs.
        teacher_address: of the Ray that the pool runs in; None takes the one of this process, or RAY_ADDRESS.
        teacher_map_size: (h, w) to which the teacher resamples its maps, so that fewer bytes travel.
        distill_layer: the student's layer, such as ``model.16``; None takes the detection head's input of stride 16.
        distill_kind: ``cosine``, ``mse``, ``smooth_l1`` or ``gram``.
        distill_weight: the weight of this loss in the sum with the detector's.
        object_weight: of locations inside boxes.
        background_weight: of the others.
    """

    teacher: str | AnyTeacher
    teacher_address: str | None = None
    teacher_map_size: tuple[int, int] | None = None
    distill_layer: str | None = None
    distill_kind: LossKind = "cosine"
    distill_weight: float = 1.0
    object_weight: float = 1.0
    background_weight: float = 0.25

    @classmethod
    def take_from(cls, arguments: dict[str, Any]) -> Distillation:
        """Take these arguments out of ``arguments``: Ultralytics refuses arguments that it does not know.

        Raises:
            ConfigError: without ``teacher``.
        """
        own = {field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments}
        if own.get("teacher") is None:
            raise ConfigError("teacher must be given: model.train(..., teacher='dinov3'), the name of a running pool")
        return cls(**own)


class _DistillationTrainer:
    """What both trainers add to Ultralytics' trainers; a mixin, the first base of each."""

    def __init__(
        self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict[str, Any] | None = None
    ) -> None:
        overrides = dict(overrides or {})
        self.distillation = Distillation.take_from(overrides)
        self._client: RemoteTeacher | None = None
        self._loss: DistillationLoss | None = None
        self._tap: FeatureTap | None = None
        super().__init__(cfg, overrides, _callbacks)  # type: ignore[call-arg] # the trainer's, next in line

    @property
    def _self(self) -> Any:
        """This trainer, untyped: Ultralytics' attributes have no types."""
        return self

    def train(self) -> Any:
        """As Ultralytics' ``train``; the pool's client is closed at the end."""
        if self._self.ddp:
            # Each rank is a process that makes the trainer again, from its class and these arguments.
            self._self.args.__dict__.update(self.arguments_for_ranks())
        try:
            return super().train()  # type: ignore[misc]
        finally:
            if self._tap is not None:
                self._tap.close()
            if self._client is not None:
                self._client.close()
                self._client = None

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Ultralytics' loader; the one for training adds the teacher's features to each batch."""
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)  # type: ignore[misc]
        if mode != "train":
            return loader
        spec = FeatureSpec(feature_map=True, map_size=self.distillation.teacher_map_size)
        stream: Prefetch[Any, Features] = Prefetch(
            self._teacher(), loader, spec, images=lambda batch: batch["img"], device=self._self.device
        )
        return TargetLoader(stream, _with_targets)

    def build_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Ultralytics' optimizer, which trains the projector too."""
        optimizer = super().build_optimizer(*args, **kwargs)  # type: ignore[misc]
        self._loss = self._make_loss()
        projector = list(self._loss.parameters())
        if projector:
            rate = optimizer.param_groups[0]["lr"]  # not the optimizer's default, which Ultralytics leaves unused
            optimizer.add_param_group({"params": projector, "lr": rate, "weight_decay": 0.0, "param_group": "distill"})
        return optimizer

    def _setup_train(self) -> None:
        super()._setup_train()  # type: ignore[misc]
        model = unwrap_model(self._self.model)
        assert self._loss is not None
        saved = self._self.wdir / _PROJECTOR_FILE
        if self._self.resume and saved.exists():
            self._loss.load_state_dict(torch.load(saved, map_location=self._self.device, weights_only=True))
        self._share_projector(self._loss)
        # The EMA was copied from the model before: neither it nor any checkpoint has the tap or the loss in it.
        self._tap = FeatureTap(model, self._layer(model)).attach()
        criterion = getattr(model, "criterion", None) or model.init_criterion()
        model.criterion = _Criterion(criterion, self._tap, self._loss, self.distillation.distill_weight)

    def save_model(self) -> Any:
        """Ultralytics' checkpoints, and the projector next to them."""
        saved = super().save_model()  # type: ignore[misc]
        assert self._loss is not None
        torch.save(self._loss.state_dict(), self._self.wdir / _PROJECTOR_FILE)
        return saved

    def _teacher(self) -> AnyTeacher:
        teacher = self.distillation.teacher
        if not isinstance(teacher, str):
            return teacher
        if self._client is None:
            self._client = RemoteTeacher(teacher, address=self.distillation.teacher_address)
        return self._client

    def arguments_for_ranks(self) -> dict[str, Any]:
        """The options as arguments, with an address under which another process finds the pool."""
        arguments = {field.name: getattr(self.distillation, field.name) for field in fields(Distillation)}
        if arguments["teacher_address"] is None and ray.is_initialized():
            arguments["teacher_address"] = ray.get_runtime_context().gcs_address
        return arguments

    def _layer(self, model: nn.Module) -> str:
        """The layer to compare: the one asked for, or the head's input whose stride is nearest to a patch."""
        if self.distillation.distill_layer is not None:
            return self.distillation.distill_layer
        head: Any = model.model[-1]  # type: ignore[index]
        strides = [abs(float(stride) - _PATCH_STRIDE) for stride in head.stride]
        return f"model.{head.f[strides.index(min(strides))]}"

    def _make_loss(self) -> DistillationLoss:
        """The loss, with a projector between the channels that both sides give for a grey image."""
        options = self.distillation
        model, size, device = unwrap_model(self._self.model), int(self._self.args.imgsz), self._self.device
        training = model.training
        grey = torch.full((1, 3, size, size), 114, dtype=torch.uint8)
        with torch.no_grad(), FeatureTap(model, self._layer(model)) as tap:
            model.eval()
            model(grey.to(device) / 255)
            channels = tap.take().shape[1]
        model.train(training)
        projector = None
        if options.distill_kind != "gram":
            found = self._teacher().extract(grey, FeatureSpec(feature_map=True)).feature_map  # type: ignore[union-attr]
            assert found is not None
            projector = nn.Conv2d(channels, found.shape[1], 1)
        return DistillationLoss(
            options.distill_kind,
            projector=projector,
            object_weight=options.object_weight,
            background_weight=options.background_weight,
        ).to(device)

    def _share_projector(self, loss: DistillationLoss) -> None:
        """Keep the projector the same in all ranks: it is outside the model that Ultralytics gives to DDP."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for parameter in loss.parameters():
            dist.broadcast(parameter.data, 0)
            parameter.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]


class DetectionDistillationTrainer(_DistillationTrainer, DetectionTrainer):  # type: ignore[misc] # untyped base
    """Ultralytics' ``DetectionTrainer`` with :class:`Distillation`'s arguments; see the module."""


class OBBDistillationTrainer(_DistillationTrainer, OBBTrainer):  # type: ignore[misc] # untyped base
    """Ultralytics' ``OBBTrainer`` with :class:`Distillation`'s arguments; see the module."""


class _Criterion:
    """A detector's criterion with the distillation loss added while the student trains."""

    def __init__(self, criterion: Any, tap: FeatureTap, loss: DistillationLoss, weight: float) -> None:
        self._criterion, self._tap, self._loss, self._weight = criterion, tap, loss, weight

    def __call__(self, predictions: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        detection, items = self._criterion(predictions, batch)
        if not isinstance(items, dict):
            raise ConfigError("ultralytics must be at least 8.4.190, whose criteria name their losses")
        distilled = self._weight * self._loss(self._tap.take(), batch[_TARGETS], Boxes.from_ultralytics(batch))
        # Ultralytics sums losses over the batch.
        total = detection.sum() + distilled * len(batch["img"])
        return total, {**items, "distill": distilled.detach()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._criterion, name)  # ``update`` and ``updates`` of end-to-end heads


def _with_targets(batch: dict[str, Any], targets: Features) -> dict[str, Any]:
    return {**batch, _TARGETS: targets}


def _average_gradient(parameter: Tensor) -> None:
    # With accumulation, the part that was averaged before is equal in all ranks: averaging does not change it.
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()
