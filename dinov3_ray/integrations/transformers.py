"""transformers: a ``Trainer`` that distils from a pool, for any model that it trains.

::

    trainer = DistillingTrainer(
        model, arguments, train_dataset=..., data_collator=...,
        teacher="dinov3", taps="model.encoder.pan_blocks.0",
    )
    trainer.train(resume_from_checkpoint=True)

Needs the extra ``transformers`` (``pip install 'dinov3-ray[transformers]'``: the package accelerate, which ``Trainer``
needs). Gradient accumulation, evaluation, resuming within an epoch and DDP work as without a teacher.

Checkpoints are what ``Trainer`` writes, for a plain transformers model, and a plain ``Trainer`` resumes from them too.
The projectors, their part of the optimizer's state, and what else the distillation remembers are in a file beside
them, ``distillation.pt``.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback

from dinov3_ray.errors import ConfigError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import Images
from dinov3_ray.integrations.loader import TargetLoader
from dinov3_ray.integrations.side_state import SideState
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.training.boxes import Boxes
from dinov3_ray.training.distiller import Distiller
from dinov3_ray.training.losses import ClsLossKind, DistillationLoss, LossKind, Term, WeightedTerms
from dinov3_ray.training.prefetch import AnyTeacher, OnReload, Prefetch, PrefetchStatistics, find_images
from dinov3_ray.training.prefetch.pipeline import as_source
from dinov3_ray.training.recipes import Recipe, get
from dinov3_ray.training.taps import FeatureTap, Select

__all__ = ["DistillingTrainer"]

log = logging.getLogger("dinov3_ray")

_TARGETS = "teacher_targets"  # their key in a batch
_FILE = "distillation.pt"


class DistillingTrainer(Trainer):  # type: ignore[misc] # transformers is treated as untyped
    """transformers' ``Trainer``, whose loss has the distillation loss added in training, but not in evaluation.

    To add it to a ``Trainer`` of your own, put this class in front: ``class Mine(DistillingTrainer, MyTrainer): ...``.

    It logs ``distillation_loss`` (as it is added to the loss) and ``teacher/wait_share`` with the training loss. The
    projector has the learning rate of the optimizer's last group, and its gradients are clipped by themselves.

    Args:
        arguments, keywords: ``Trainer``'s own.
        teacher: the name of a pool, to which each rank then connects; or a teacher.
        taps: the student's layer that should resemble the teacher, or several; see
            :func:`~dinov3_ray.training.taps.layer_names`. With a recipe, None finds it.
        recipe: in place of ``spec``, ``loss`` and ``weight``: a name of :mod:`~dinov3_ray.training.recipes`, or a
            Recipe. The student then computes the training set's first sample once, before training.
        spec: what the teacher computes; None is the final map.
        loss: a kind of loss, which gets a projector to the teacher's channels, and weighs objects by 1 and background
            by 0.25; or a loss, of which each tap gets a copy; None is ``cosine``.
        weight: of the distillation loss in the sum; or one for each tap, by name; None is 1.
        images: returns the images of a batch, in 0..1 or as uint8; None is
            :func:`~dinov3_ray.training.prefetch.find_images`, and undoes the normalization of ``processing_class``.
        boxes: returns where the objects of a batch are, as :class:`~dinov3_ray.training.losses.DistillationLoss` takes
            it; None reads ``labels`` as DETR and its kin have them: a dict per image, with normalized xywh ``boxes``.
        select: as in :class:`~dinov3_ray.training.taps.FeatureTap`.
        depth, on_reload: as in :class:`~dinov3_ray.training.prefetch.PrefetchOptions`.
        address: of the Ray that the pool runs in; None takes the one of this process, or RAY_ADDRESS.

    Raises:
        ConfigError: names the option, the rule and the value.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: str | AnyTeacher,
        taps: str | Sequence[str] | None = None,
        recipe: str | Recipe | None = None,
        spec: FeatureSpec | None = None,
        loss: DistillationLoss | LossKind | None = None,
        weight: float | Mapping[str, float] | None = None,
        images: Callable[[Any], Images] | None = None,
        boxes: Callable[[Any], Boxes | Tensor | None] | None = None,
        select: Select | Mapping[str, Select] | None = None,
        depth: int | Literal["auto"] = "auto",
        on_reload: OnReload = "warn",
        address: str | None = None,
        **keywords: Any,
    ) -> None:
        names = (taps,) if isinstance(taps, str) else tuple(taps or ())
        self._recipe = _checked_recipe(recipe, names, spec, loss, weight)
        self._spec = spec or (self._recipe.spec if self._recipe else FeatureSpec(feature_map=True))
        self._kind_or_loss = loss or "cosine"
        self._weights = (
            dict(weight)
            if isinstance(weight, Mapping)
            else dict.fromkeys(names, 1.0 if weight is None else float(weight))
        )
        if set(self._weights) != set(names):
            raise ConfigError(
                f"weight must have one entry per tap ({', '.join(names)}); got {', '.join(self._weights)}"
            )
        like = loss if isinstance(loss, DistillationLoss) else DistillationLoss(loss or "cosine")
        if (
            self._recipe is None
            and like.layer is None
            and not getattr(self._spec, "cls" if like.on_cls else "feature_map")
        ):
            raise ConfigError(f"spec must ask for what loss {like.kind!r} compares; got {spec!r}")
        self._teacher, self._address = teacher, address
        self._client: RemoteTeacher | None = None
        self._select = select
        self._images, self._boxes = images or self._find_images, boxes or _find_boxes
        self._depth, self._on_reload = depth, on_reload
        self._loaded_from = ""
        self._losses: Distiller | None = None
        self._projector_state: SideState | None = None
        self._equal_on_ranks = False
        self._epoch = _CurrentEpoch()
        self._stream: Prefetch[Any, Features] | None = None
        self._batches: Any = None
        self._statistics = PrefetchStatistics()
        self._sum: float | Tensor = 0.0
        self._count = 0
        super().__init__(*arguments, **keywords)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"a distilling trainer must have one GPU per process; got {self.args.n_gpu} "
                "(start it with torchrun, or set CUDA_VISIBLE_DEVICES)"
            )
        if names:
            FeatureTap(self.model, names, select=select)  # unknown layers are refused now
        self.add_callback(_AtSteps(self))

    @property
    def distillation(self) -> Distiller | None:
        """The losses of the taps, with their projectors and weight, once training has begun."""
        return self._losses

    def statistics(self) -> PrefetchStatistics:
        """Of the batches with targets, over all epochs of the last ``train``."""
        return self._statistics if self._stream is None else self._stream.statistics()

    # What Trainer calls, in the order of a run ----------------------------------------------------------------------

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """As ``Trainer.train``; at the end, nothing is in flight, and the model has no hooks of ours."""
        self._statistics = PrefetchStatistics()
        try:
            return super().train(*arguments, **keywords)
        finally:
            self._end_epoch()
            self._statistics, self._stream = self.statistics(), None
            if self._losses is not None:
                self._losses.tap.close()
                self._losses.tap.clear()
            if self._client is not None:
                self._client.close()
                self._client = None

    def get_train_dataloader(self) -> Any:
        """``Trainer``'s loader; its batches stay on the CPU until their steps, as the pool reads images there."""
        loader = super().get_train_dataloader()
        if getattr(loader, "device", None) is not None:
            loader.device = None
        self._epoch.loader = loader
        return loader

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> Any:
        """``Trainer``'s optimizer, which trains the projectors too."""
        optimizer = super().create_optimizer(*arguments, **keywords)
        present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self._losses is None or not all(id(parameter) in present for parameter in self._losses.parameters()):
            self._losses = self._make_losses()
            projectors = list(self._losses.parameters())
            if projectors and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                raise ConfigError("a projector must be trained without FSDP and DeepSpeed (use DDP, or loss='gram')")
            optimizer.param_groups[-1]["params"].extend(projectors)
            self._projector_state = SideState(optimizer, projectors)
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._loaded_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._loaded_from = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # transformers 5 saves some models under the names of their first releases, RT-DETR and D-FINE among them. Its
        # Trainer looks for today's names there, and leaves the weights that it misses as they were made.
        if load_result.missing_keys and isinstance(self.model, PreTrainedModel):
            saved = type(self.model).from_pretrained(self._loaded_from, dtype=self.model.dtype)
            load_result = self.model.load_state_dict(saved.state_dict(), strict=False)
        super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_projectors(Path(checkpoint) / _FILE)
        super()._load_optimizer_and_scheduler(checkpoint)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *arguments: Any, **keywords: Any) -> Any:
        """``Trainer``'s batches of one optimizer step, each with its targets."""
        # Whatever Trainer made of its loader, such as one that skips what a checkpoint has seen, it draws from this.
        if self._epoch.iterator is not epoch_iterator:
            self._end_epoch()
            self._epoch.iterator = epoch_iterator
            if self._stream is None:
                self._stream = self._make_stream()
            self._batches = iter(TargetLoader(self._stream, _with_targets))
        return super().get_batch_samples(self._batches, *arguments, **keywords)

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        """As ``Trainer.training_step``; an error in it leaves nothing of the batch in memory."""
        assert self._losses is not None
        try:
            loss: Tensor = super().training_step(*arguments, **keywords)
        except BaseException:
            self._end_epoch()
            raise
        finally:
            self._losses.tap.clear()
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            for parameter in self._losses.parameters():  # they are outside the model that DDP wraps
                assert parameter.grad is not None
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """``Trainer``'s loss, with the distillation loss added where the batch has targets."""
        targets = inputs.get(_TARGETS)
        if targets is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        given = {name: value for name, value in inputs.items() if name != _TARGETS}
        boxes = None if self._recipe else self._boxes(given)  # no recipe weighs objects
        loss, outputs = super().compute_loss(model, given, True, num_items_in_batch=num_items_in_batch)
        with self.accelerator.autocast():
            distilled = self._distilled(targets, boxes)
        self._sum, self._count = self._sum + distilled.detach(), self._count + 1
        if self._is_scaled_for_accumulation(num_items_in_batch):
            distilled = distilled / self.current_gradient_accumulation_steps
        return (loss + distilled, outputs) if return_outputs else loss + distilled

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """As ``Trainer.log``, with the figures that the class names."""
        if "loss" in logs and self._count:  # in training
            mean = self.accelerator.reduce(torch.as_tensor(self._sum / self._count), "mean")
            logs |= {"distillation_loss": float(mean), "teacher/wait_share": self.statistics().wait_share}
            if self._losses is not None and self._losses.share is not None:
                logs["distillation_weight"] = self._losses.weight
            self._sum, self._count = 0.0, 0
        super().log(logs, *arguments, **keywords)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self._losses is not None and self._projector_state is not None:
            saved = {
                "losses": self._losses.state_dict(),
                "optimizer": self._projector_state.state(),
                **self._made_of(),
            }
            torch.save(saved, Path(output_dir) / _FILE)

    # What the callback calls ----------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Training begins, with the model and the optimizer in place; or begins anew with smaller batches."""
        assert self._losses is not None
        self._losses.tap_on(self.model)
        self._losses.tap.attach()
        self._equal_on_ranks = self.accelerator.num_processes == 1
        self.zero_projectors()

    def begin_epoch(self, epoch: float) -> None:
        """An epoch begins."""
        assert self._losses is not None
        self._losses.set_epoch(int(epoch))

    def clip_projectors(self) -> None:
        """The gradients are complete: clip those that ``Trainer`` does not reach through the model."""
        assert self._losses is not None
        projectors = list(self._losses.parameters())
        if projectors and self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(projectors, self.args.max_grad_norm)

    def zero_projectors(self) -> None:
        """``Trainer`` has used the gradients; it zeroes those of the model."""
        assert self._losses is not None
        self._losses.zero_grad()

    # Ours -----------------------------------------------------------------------------------------------------------

    def _opened(self) -> AnyTeacher:
        if not isinstance(self._teacher, str):
            return self._teacher
        if self._client is None:
            self._client = RemoteTeacher(self._teacher, address=self._address)
        return self._client

    def _make_losses(self) -> Distiller:
        if self._recipe is not None:
            teacher: Any = self._opened()
            layers = tuple(self._weights) or None
            found = self._recipe.for_student(self.model, teacher, self._example(), layers, self._select)
            return found.to(self.args.device)
        loss = self._kind_or_loss
        if not isinstance(loss, DistillationLoss):
            channels = None
            if loss != "gram":
                grey = torch.full((1, 3, 224, 224), 114, dtype=torch.uint8)
                features: Features = self._opened().extract(grey, self._spec)  # type: ignore[union-attr]
                channels = getattr(features, "cls" if loss in get_args(ClsLossKind) else "feature_map").shape[1]
            loss = DistillationLoss(loss, projector=channels, background_weight=0.25)
        terms = WeightedTerms([Term(name, copy.deepcopy(loss), weight) for name, weight in self._weights.items()])
        return Distiller(self.model, terms, self._spec, select=self._select).to(self.args.device)

    def _example(self) -> dict[str, Any]:
        """A batch of the first sample, without labels, as the student gets it; no random number is drawn for it."""
        before = random.getstate(), np.random.get_state()
        with torch.random.fork_rng([]):
            loader = self.get_train_dataloader() if self._epoch.loader is None else self._epoch.loader
            if isinstance(loader.dataset, IterableDataset):
                raise ConfigError(
                    "train_dataset must have a first sample, by which a recipe meets the student; got none"
                )
            batch = loader.collate_fn([loader.dataset[0]])
        random.setstate(before[0])
        np.random.set_state(before[1])
        taken = inspect.signature(self.model.forward).parameters
        kept = {name: each for name, each in batch.items() if name != "labels" and name in taken}
        return {name: each.to(self.args.device) if isinstance(each, Tensor) else each for name, each in kept.items()}

    def _made_of(self) -> dict[str, Any]:
        """What a checkpoint's distillation must have in common with this one."""
        assert self._losses is not None
        return {"recipe": self._recipe.name if self._recipe else None, "taps": list(self._losses.tap.names)}

    def _load_projectors(self, file: Path) -> None:
        assert self._losses is not None
        assert self._projector_state is not None
        if not file.exists():
            log.warning("%s is not there: the checkpoint has no projectors, which begin untrained", file)
            return
        saved = torch.load(file, map_location="cpu", weights_only=True)
        for option, own in self._made_of().items():
            if saved.get(option) != own:
                raise ConfigError(
                    f"{option} must be that which {file} was saved with, {saved.get(option)!r}; got {own!r}"
                )
        try:
            self._losses.load_state_dict(saved["losses"])
        except RuntimeError as error:
            raise ConfigError(f"taps and loss must be those that {file} was saved with; got {error}") from error
        self._projector_state.load(saved["optimizer"])

    def _make_stream(self) -> Prefetch[Any, Features]:
        teacher, depth, steps = self._opened(), self._depth, self.args.gradient_accumulation_steps
        together = hasattr(self._epoch, "slice_fn")
        if depth == "auto" and not together and steps > 2 * as_source(teacher).parallelism:
            depth = steps + 1  # Trainer takes the batches of a step all at once
        return Prefetch(
            teacher,
            self._epoch,
            None if self._recipe else self._spec,
            recipe=self._recipe,
            images=self._images,
            depth=depth,
            device=self.args.device,
            on_reload=self._on_reload,
        )

    def _end_epoch(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        self._epoch.iterator = iter(())

    def _find_images(self, batch: Any) -> Images:
        images = find_images(batch)
        processor: Any = getattr(self.processing_class, "image_processor", self.processing_class)
        if not isinstance(images, Tensor) or not getattr(processor, "do_normalize", False):
            return images
        mean, deviation = (
            torch.tensor(each, device=images.device, dtype=images.dtype)[:, None, None]
            for each in (processor.image_mean, processor.image_std)
        )
        return (images * deviation + mean).clamp(0, 1)

    def _distilled(self, targets: Features, boxes: Boxes | Tensor | None) -> Tensor:
        assert self._losses is not None
        if not self._equal_on_ranks:
            if any(isinstance(parameter, UninitializedParameter) for parameter in self._losses.parameters()):
                self._losses.settle(targets)  # a projector takes its channels from the first batch
            for parameter in self._losses.parameters():
                dist.broadcast(parameter.data, 0)
            self._equal_on_ranks = True
        loss: Tensor = self._losses(targets, boxes)
        return loss

    def _is_scaled_for_accumulation(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether ``Trainer`` takes its loss as a share of the optimizer step's, and so does not divide it."""
        stated = getattr(self, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return bool(stated)
        return self.compute_loss_func is not None or bool(
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        )


class _AtSteps(TrainerCallback):  # type: ignore[misc] # untyped base
    """Calls the trainer where ``Trainer`` has no method to override."""

    def __init__(self, trainer: DistillingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.attach()

    def on_epoch_begin(self, _: object, state: Any, *__: Any, **___: Any) -> None:
        self._trainer.begin_epoch(state.epoch or 0)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer.clip_projectors()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer.zero_projectors()


class _CurrentEpoch(Iterable[Any]):
    """A loader whose one pass is the iterator that ``Trainer`` made of its own loader for the epoch."""

    def __init__(self) -> None:
        self.loader: Any = None
        self.iterator: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.iterator

    def __getattr__(self, name: str) -> Any:
        if name in ("slice_fn", "state"):  # by these, a prefetch sees that all ranks must draw in the same steps
            return getattr(self.loader, name)
        raise AttributeError(name)


def _checked_recipe(recipe: Any, taps: tuple[str, ...], spec: Any, loss: Any, weight: Any) -> Recipe | None:
    if recipe is None:
        if not taps:
            raise ConfigError("taps must name the student's layer to compare (or a recipe finds it)")
        return None
    found = get(recipe)
    given = [name for name, value in (("spec", spec), ("loss", loss), ("weight", weight)) if value is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)} must be left out where a recipe gives them; got recipe={found.name!r} (another weight "
            f"is an option of the recipe: recipe=recipes.{found.name}(weight=2.0))"
        )
    return found


def _with_targets(batch: Any, targets: Features) -> Any:
    joined = copy.copy(batch)
    joined[_TARGETS] = targets
    return joined


def _find_boxes(batch: Mapping[str, Any]) -> Boxes | None:
    labels = batch.get("labels")
    if not isinstance(labels, (list, tuple)) or not labels:
        return None
    if not all(isinstance(each, Mapping) and "boxes" in each for each in labels):
        return None
    return Boxes.of([each["boxes"] for each in labels], format="xywh")
