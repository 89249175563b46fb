"""Ultralytics: trainers that distil from a pool, for detection, oriented boxes, segmentation and pose.

::

    YOLO("yolo26n-obb.yaml").train(data="dota8.yaml", trainer=OBBDistillationTrainer, teacher="dinov3")

Needs the extra ``ultralytics`` (``pip install 'dinov3-ray[ultralytics]'``; it is licensed under AGPL-3.0).

The teacher gets each batch as the loader makes it for the student: letterboxed, augmented, uint8 in RGB. Ultralytics
divides by 255 later, so that there is no normalisation to undo. ``multi_scale`` resizes later, too: the student then
sees the same picture in another size, and the teacher's map covers it as before. The loss compares layers of the
student with that map; by default one, the neck's output at stride 16, which is the stride of a DINOv3 patch. Locations
inside boxes (oriented boxes too) have one weight, all others another. ``recipe="rtdetrv4"`` takes a published recipe in
place of these options. Ultralytics shows the loss as ``distill``, with its own.

Checkpoints are plain Ultralytics checkpoints, with which training can be resumed without this package too. What is
needed in training only, the projectors with the optimizer's state of them, and what a recipe remembers, is saved next
to them as ``distill.pt``.
``resume=True`` with ``teacher=...`` continues with it, and with the options of the run unless others are given.
"""

from __future__ import annotations

import logging
import operator
import os
import random
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import Tensor
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import unwrap_model

from dinov3_ray.errors import ConfigError
from dinov3_ray.features import Features
from dinov3_ray.integrations.distillation_options import Distillation
from dinov3_ray.integrations.levels import named_levels
from dinov3_ray.integrations.loader import TargetLoader
from dinov3_ray.integrations.side_state import SideState
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.training.boxes import Boxes
from dinov3_ray.training.distiller import Distiller
from dinov3_ray.training.prefetch import AnyTeacher, Prefetch

__all__ = [
    "DetectionDistillationTrainer",
    "Distillation",
    "OBBDistillationTrainer",
    "PoseDistillationTrainer",
    "SegmentationDistillationTrainer",
]

log = logging.getLogger("dinov3_ray")

_TARGETS = "teacher"  # the key of the targets in a batch
_BOXES = "teacher_boxes"  # of the places of the objects, in shares of the picture
_CHANCE = "teacher_chance"  # of the state of Python's random behind the draw of the batch
_LOSS = "distill"  # the name under which Ultralytics shows the loss
_PATCH_STRIDE = 16
_PROJECTOR_FILE = "distill.pt"


class _DistillationTrainer:
    """What the trainers add to Ultralytics' trainers; a mixin, the first base of each."""

    def __init__(
        self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict[str, Any] | None = None
    ) -> None:
        overrides = dict(overrides or {})
        given = Distillation.take_from(overrides)
        self.distillation = Distillation(**given)
        self._client: RemoteTeacher | None = None
        self._loss: Distiller | None = None
        self._side: SideState | None = None
        self._criterion: _Criterion | None = None
        super().__init__(cfg, overrides, _callbacks)  # type: ignore[call-arg] # the trainer's, next in line
        if self._self.args.distill_model is not None:
            raise ConfigError(
                f"distill_model must be None where a pool is the teacher; got {self._self.args.distill_model!r} "
                "(Ultralytics' own trainer takes a YOLO model as teacher)"
            )
        if self._self.resume:
            options = _saved_beside(Path(self._self.args.model)).get("options", {})
            self.distillation = Distillation.resumed(options, given)

    @property
    def _self(self) -> Any:
        """This trainer, untyped: Ultralytics' attributes have no types."""
        return self

    def train(self) -> Any:
        """As Ultralytics' ``train``; at the end, however it comes, nothing is in flight and the model has no tap."""
        if self._self.ddp:
            # Each rank is a process that makes the trainer again, from its class and these arguments.
            self._self.args.__dict__.update(self.arguments_for_ranks())
        try:
            return super().train()  # type: ignore[misc]
        finally:
            self._detach()
            loader = getattr(self, "train_loader", None)
            if isinstance(loader, _TrainLoader):
                loader.give_up()
            if self._client is not None:
                self._client.close()
                self._client = None

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Ultralytics' loader; the one for training adds the teacher's features to each batch."""
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)  # type: ignore[misc]
        if mode != "train":
            return loader
        recipe = self.distillation.to_recipe()
        stream: Prefetch[Any, Features] = Prefetch(
            self._teacher(), loader, recipe=recipe, images=self._view, device=self._self.device
        )
        return _TrainLoader(stream)

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ultralytics' batch for the student; the criterion gets the targets."""
        targets, boxes, chance = (batch.pop(key, None) for key in (_TARGETS, _BOXES, _CHANCE))
        with _chance(chance):
            batch = super().preprocess_batch(batch)  # type: ignore[misc]
        if self._criterion is not None and targets is not None:
            assert self._loss is not None
            self._loss.set_epoch(self._self.epoch)
            self._criterion.expect(targets, boxes.to(self._self.device, non_blocking=True))
        return batch

    def build_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Ultralytics' optimizer, which trains the projectors too, but whose ``state_dict`` is without them."""
        optimizer = super().build_optimizer(*args, **kwargs)  # type: ignore[misc]
        self._loss = self._make_distiller()
        projectors = list(self._loss.parameters())
        if projectors:
            self._side = SideState.in_own_group(optimizer, projectors, _LOSS)
        return optimizer

    def _setup_train(self) -> None:
        super()._setup_train()  # type: ignore[misc]
        assert self._loss is not None
        self._share_projectors(self._loss)
        self._attach()

    def _attach(self) -> None:
        # The EMA was copied from the model before: neither it nor any checkpoint has the tap or the loss in it.
        model = unwrap_model(self._self.model)
        assert self._loss is not None
        self._loss.tap_on(model)
        self._loss.tap.attach()
        plain = getattr(model, "criterion", None) or model.init_criterion()
        self._criterion = model.criterion = _Criterion(plain, self._loss)

    def _detach(self) -> None:
        if self._criterion is not None:
            unwrap_model(self._self.model).criterion = self._criterion.detach()
            self._criterion = None

    def _clear_memory(self, threshold: float | None = None) -> None:
        # After a step that was out of memory, Ultralytics frees what is left of it, and tries a smaller batch.
        if self._criterion is not None:
            self._criterion.forget()
        super()._clear_memory(threshold)  # type: ignore[misc]

    def label_loss_items(self, loss_items: Any = None, prefix: str = "train") -> Any:
        """Ultralytics' names of the losses; validation has no targets, and therefore no loss of this kind."""
        labels = super().label_loss_items(loss_items, prefix)  # type: ignore[misc]
        absent = f"val/{_LOSS}"
        if isinstance(labels, dict):
            return {name: value for name, value in labels.items() if name != absent}
        return [name for name in labels if name != absent]

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Ultralytics' row of ``results.csv``, with what is ours last: rows without it stand under the right names.

        Nothing is ours in a file that was begun without it.
        """
        names = [f"train/{_LOSS}"]
        if self._side is not None:
            names.append(f"lr/pg{len(self._self.optimizer.param_groups) - 1}")
        own = {name: metrics.pop(name) for name in names if name in metrics}
        file: Path = self._self.csv
        if not file.exists() or names[0] in file.read_text(encoding="utf-8").partition("\n")[0].split(","):
            metrics.update(own)
        super().save_metrics(metrics)  # type: ignore[misc]

    def save_model(self) -> Any:
        """Ultralytics' checkpoints, and the projectors beside them."""
        saved = super().save_model()  # type: ignore[misc]
        assert self._loss is not None
        state = {
            "epoch": self._self.epoch,
            "options": self.distillation.to_resume(),
            "layers": list(self._loss.tap.names),
            "loss": self._loss.state_dict(),
            "optimizer": self._side.state() if self._side else [],
        }
        file = self._self.wdir / _PROJECTOR_FILE
        torch.save(state, file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)
        return saved

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        # To resume a run; or within one, after NaN. Ultralytics then copies the model as its new EMA.
        within = self._criterion is not None
        self._detach()
        super()._load_checkpoint_state(ckpt)  # type: ignore[misc]
        self._load_projectors(self._self.last if within else Path(self._self.args.model), ckpt["epoch"])
        if within:
            self._attach()

    def _load_projectors(self, checkpoint: Path, epoch: int) -> None:
        assert self._loss is not None
        saved, layers = _saved_beside(checkpoint), list(self._loss.tap.names)
        if not saved:
            log.warning("%s has no %s beside it: the projectors begin anew", checkpoint, _PROJECTOR_FILE)
            return
        if saved["layers"] != layers:
            raise ConfigError(
                f"distill_layer must be that of the run which is resumed, {', '.join(saved['layers'])}; "
                f"got {', '.join(layers)} (leave it out; or delete {_PROJECTOR_FILE}, and the projectors begin anew)"
            )
        if saved["epoch"] != epoch:
            log.warning("%s is of epoch %d, %s is of epoch %d", _PROJECTOR_FILE, saved["epoch"], checkpoint.name, epoch)
        try:
            self._loss.load_state_dict(saved["loss"])
        except RuntimeError as error:
            raise ConfigError(
                f"teacher, recipe and distill_kind must be those of the run which is resumed; {error} "
                f"(delete {_PROJECTOR_FILE}, and the projectors begin anew)"
            ) from error
        if self._side is not None:
            self._side.load(saved["optimizer"])

    def _teacher(self) -> AnyTeacher:
        teacher = self.distillation.teacher
        if not isinstance(teacher, str):
            return teacher
        if self._client is None:
            self._client = RemoteTeacher(teacher, address=self.distillation.teacher_address)
        return self._client

    def arguments_for_ranks(self) -> dict[str, Any]:
        """The options as arguments, with an address under which another process finds the pool."""
        arguments = self.distillation.to_arguments()
        if arguments["teacher_address"] is None and ray.is_initialized():
            arguments["teacher_address"] = ray.get_runtime_context().gcs_address
        return arguments

    def _view(self, batch: dict[str, Any]) -> Tensor:
        """The images of a batch that was drawn just now.

        ``multi_scale`` takes the size of a batch from Python's random when the student gets the batch. A loader without
        workers augments from there too, and it is ahead here, by a depth that varies. The numbers for the size are
        therefore skipped now, and used later: all batches and sizes are those of a loop that is not ahead.
        """
        if self._self.args.multi_scale and not self._self.args.workers:
            batch[_CHANCE] = random.getstate()
            super().preprocess_batch({"img": torch.zeros(1, 1, 1, 1)})  # type: ignore[misc]
        images: Tensor = batch["img"]
        return images

    def _make_distiller(self) -> Distiller:
        """The loss, with projectors between the channels that both sides give for a grey image."""
        options = self.distillation
        model, size = unwrap_model(self._self.model), int(self._self.args.imgsz)
        layers = None
        if options.recipe is None or options.distill_layer is not None:
            head = model.model[-1]
            strides, taken = getattr(head, "stride", ()), head.f if isinstance(head.f, list) else [head.f]
            inputs = {float(stride): f"model.{layer}" for stride, layer in zip(strides, taken, strict=False)}
            layers = named_levels(options.distill_layer, inputs, _PATCH_STRIDE)
        grey = torch.full((1, 3, size, size), 114 / 255, device=self._self.device)
        teacher: Any = self._teacher()
        try:
            return options.to_recipe().for_student(model, teacher, grey, layers)
        except ConfigError as error:
            if self._self.args.freeze is None:
                raise
            raise ConfigError(f"{error}; the trainer has freeze={self._self.args.freeze}") from error

    def _share_projectors(self, loss: Distiller) -> None:
        """Keep the projectors the same in all ranks: they are outside the model that Ultralytics gives to DDP."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for parameter in loss.parameters():
            dist.broadcast(parameter.data, 0)
            parameter.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]


class DetectionDistillationTrainer(_DistillationTrainer, DetectionTrainer):  # type: ignore[misc] # untyped base
    """Ultralytics' ``DetectionTrainer`` with :class:`Distillation`'s arguments; see the module."""


class OBBDistillationTrainer(_DistillationTrainer, OBBTrainer):  # type: ignore[misc] # untyped base
    """Ultralytics' ``OBBTrainer`` with :class:`Distillation`'s arguments; see the module."""


class SegmentationDistillationTrainer(_DistillationTrainer, SegmentationTrainer):  # type: ignore[misc] # untyped base
    """Ultralytics' ``SegmentationTrainer`` with :class:`Distillation`'s arguments; see the module."""


class PoseDistillationTrainer(_DistillationTrainer, PoseTrainer):  # type: ignore[misc] # untyped base
    """Ultralytics' ``PoseTrainer`` with :class:`Distillation`'s arguments; see the module."""


class _TrainLoader(TargetLoader):
    """Ultralytics' loader for training, with targets in its batches."""

    def __init__(self, stream: Prefetch[Any, Features]) -> None:
        super().__init__(stream, _with_targets)
        self._passing: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        self._passing = super().__iter__()
        return self._passing

    def give_up(self) -> None:
        """End the pass: what was drawn for it is dropped, and nothing is in flight."""
        if self._passing is not None:
            self._passing.close()  # type: ignore[attr-defined] # a generator
            self._passing = None

    def close(self) -> None:
        """End the pass and the loader's workers: Ultralytics builds another loader, of smaller batches, or is done."""
        self.give_up()
        self.stream.loader.close()  # type: ignore[attr-defined] # Ultralytics'


class _Criterion:
    """A detector's criterion, with the distillation loss added for a batch that has targets."""

    def __init__(self, criterion: Any, distiller: Distiller) -> None:
        self._criterion, self._distiller = criterion, distiller
        self._expected: tuple[Features, Boxes] | None = None

    def expect(self, targets: Features, boxes: Boxes) -> None:
        """Take the targets of the batch that comes next."""
        self._expected = targets, boxes

    def forget(self) -> None:
        """Keep nothing of a batch that came no further than the forward pass."""
        self._expected = None
        self._distiller.tap.clear()

    def detach(self) -> Any:
        """The detector's criterion, without this one around it."""
        self._distiller.tap.close()
        self.forget()
        return self._criterion

    def __call__(self, predictions: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            detection, items = self._criterion(predictions, batch)
            if self._expected is None:
                return detection, items
            if not isinstance(items, dict):
                raise ConfigError("ultralytics must be at least 8.4.190, whose criteria name their losses")
            distilled = self._distiller(*self._expected)
        finally:
            self.forget()  # what fails leaves nothing behind
        # Ultralytics sums losses over the batch.
        total = detection.sum() + distilled * len(batch["img"])
        return total, {**items, _LOSS: distilled.detach()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._criterion, name)  # ``update`` and ``updates`` of end-to-end heads

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return operator.itemgetter(0), ((self._criterion,),)  # a copy of the model has the detector's own criterion


def _with_targets(batch: dict[str, Any], targets: Features) -> dict[str, Any]:
    # The places of the objects hold in the picture as it is now: multi_scale stretches it, but turns no oriented box.
    return {**batch, _TARGETS: targets, _BOXES: Boxes.from_ultralytics(batch)}


def _saved_beside(checkpoint: Path) -> dict[str, Any]:
    """What was saved beside a checkpoint; nothing where no distillation was."""
    file = checkpoint.with_name(_PROJECTOR_FILE)
    return dict(torch.load(file, map_location="cpu", weights_only=True)) if file.exists() else {}


@contextmanager
def _chance(state: Any) -> Generator[None, None, None]:
    """Within it, Python's random goes on from ``state``; behind it, from where it was before. Nothing for None."""
    before = random.getstate()
    if state is not None:
        random.setstate(state)
    try:
        yield
    finally:
        if state is not None:
            random.setstate(before)


def _average_gradient(parameter: Tensor) -> None:
    # With accumulation, the part that was averaged before is equal in all ranks: averaging does not change it.
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()
