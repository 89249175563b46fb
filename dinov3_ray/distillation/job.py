"""A distillation from its beginning to its end: the pool, the student, evaluation, training, and the weights."""

from __future__ import annotations

import difflib
import logging
import math
import secrets
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dinov3_ray.checkpoint import fingerprint
from dinov3_ray.config import ModelConfig, open_config
from dinov3_ray.distillation.augmentation import Augmentation
from dinov3_ray.distillation.display import Display, StepReport
from dinov3_ray.distillation.evaluation import LabelledPictures, score, teacher_features
from dinov3_ray.distillation.run_folder import CHECKPOINT, COLUMNS, RUN, SUMMARY, RunFolder
from dinov3_ray.distillation.student_backbone import StudentBackbone
from dinov3_ray.distillation.students import Normalize, open_student
from dinov3_ray.distillation.training_run import Amp, Schedule, TrainingRun, choose_amp
from dinov3_ray.distillation.view_order import Pictures, ViewDataset, view_batches
from dinov3_ray.errors import CheckpointError, ConfigError
from dinov3_ray.interrupts import Interrupts
from dinov3_ray.machine.cpus import usable_cpus
from dinov3_ray.model.device import as_device
from dinov3_ray.pool.address import NAMESPACE
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.pool.teacher_pool import TeacherPool
from dinov3_ray.training import recipes
from dinov3_ray.training.prefetch import Prefetch, prefetch
from dinov3_ray.training.taps import FeatureTap, layer_names

__all__ = ["DistillSettings", "DistillSummary", "distill_backbone"]

log = logging.getLogger("dinov3_ray")

_LOG_EVERY = 10  # steps from one row of metrics.csv to the next, at most: a tenth of a run is a row at least
_MOST_WORKERS = 8
_TOLD = 5  # unreadable images that are reported one by one
_WARMUP = 0.05  # of all steps
_FEW = 20_000  # images, up to which LightlyTrain makes its queue about a quarter as long


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """The options of ``dinov3-ray distill``; their help explains them."""

    source: str
    out: Path
    student: str
    root: str | None = None
    revision: str | None = None
    pool: str | None = None
    namespace: str = NAMESPACE
    address: str | None = None
    replicas: int | Literal["auto"] | tuple[int, int] = "auto"
    recipe: str = "lightly"
    layers: tuple[str, ...] = ()
    pretrained: bool = False
    normalize: Normalize = "auto"
    epochs: int | None = None
    steps: int | None = None
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    image_size: tuple[int, int] = (224, 224)
    amp: Amp = "auto"
    seed: int = 0
    device: str = "auto"
    workers: int | None = None
    save_every: int = 200
    evaluate: str | None = None

    def __post_init__(self) -> None:
        if (self.root is None) == (self.pool is None):
            raise ConfigError("exactly one of root and pool must be given: they say who teaches")
        if self.pool is not None and self.replicas != "auto":
            raise ConfigError(f"replicas belong to root: pool {self.pool!r} has its own; got {self.replicas}")
        if self.epochs is not None and self.steps is not None:
            raise ConfigError("epochs and steps must not both be given: each says how long to train")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0; got {self.seed}")
        for name in ("epochs", "steps", "batch", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}")
        if not self.lr > 0 or self.weight_decay < 0:
            raise ConfigError(
                f"lr must be more than 0, and weight_decay at least 0; got {self.lr} and {self.weight_decay}"
            )


@dataclass(frozen=True, slots=True)
class DistillSummary:
    """What a run gave, as summary.json holds it.

    Attributes:
        teacher, fingerprint: the pool's description of its teacher, and what identifies it.
        student, framework: as it was named, and what it belongs to.
        recipe: the name.
        weights: the folder of the student's weights.
        usage: how they are loaded, as a line of Python.
        mean, std: by which pixels in 0..1 were normalised for the student.
        images: of the source; ``unreadable``: why some of those that came up could not be read, by name.
        steps, batch: of the training.
        first_loss, last_loss: the means of the first and the last tenth of the steps (of what metrics.csv has of them).
        seconds: of the training, over all processes that took part in it.
        scores: of ``before``, ``after`` and ``teacher``, with ``evaluate``; shares of 0 to 1. Of an evaluation that was
            first asked for when training had begun, there is no ``before``.
        scored_on: describes the images that they belong to.
        resumed: whether another process had begun the run.
    """

    teacher: str
    fingerprint: str | None
    student: str
    framework: str
    recipe: str
    weights: str
    usage: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    unreadable: dict[str, str]
    steps: int
    batch: int
    first_loss: float
    last_loss: float
    seconds: float
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    scored_on: Mapping[str, Any] | None = None
    resumed: bool = False


def distill_backbone(settings: DistillSettings, display: Display, interrupts: Interrupts) -> DistillSummary:
    """Train a student backbone to resemble a teacher on images without labels, and write its weights.

    A run that ended early, however it ended, goes on from its last checkpoint. On a CPU, the weights are then those of
    the undisturbed run, bit for bit, if torch has as many threads. A run that has come to its end is not done again;
    where it was not evaluated, it still can be.

    Raises:
        ConfigError, CheckpointError, InputError, StoreError, PoolError: an option, a file or the cluster is wrong.
        NumericsError: the loss is not finite.
        KeyboardInterrupt: a signal arrived; the state is saved.
    """
    folder = RunFolder(settings.out)
    recipe = recipes.get(settings.recipe)
    config = None
    if settings.root is not None:
        config = open_config(settings.root, revision=settings.revision, image_size=recipe.image_size)
        _check_size(settings.image_size, config)
    with display.phase(f"listing {settings.source}"):
        pictures = Pictures.open(settings.source, exclude=str(folder.path))
        labelled = None if settings.evaluate is None else LabelledPictures(settings.evaluate, settings.image_size)
    identity = _identity(settings, pictures)
    with folder.held():
        folder.check_same(identity)
        there = folder.summary()
        done = None if there is None else DistillSummary(**there)
        if done is not None:
            if config is not None:
                folder.check_same({"fingerprint": fingerprint(config)})
            if labelled is not None:
                labelled.check_same(done.scored_on, folder.path)
            if labelled is None or "after" in done.scores:
                display.note(f"{folder.path} is finished: nothing is done again")
                return done
        job = _BackboneJob(settings, folder, recipe, pictures, labelled, done, display, interrupts)
        with _shared_cpus(config), _serving(settings, config, job.device, display) as teacher:
            folder.check_same({"fingerprint": teacher.fingerprint})
            if folder.settings() is None:
                folder.write_json(RUN, {**identity, "fingerprint": teacher.fingerprint})
            return job.run(teacher, identity["steps"])


def _identity(settings: DistillSettings, pictures: Pictures) -> dict[str, Any]:
    """What a resumed run must have in common with the one that it resumes, as JSON values."""
    steps = settings.steps or math.ceil((settings.epochs or 100) * len(pictures) / settings.batch)
    names = ("student", "recipe", "pretrained", "normalize", "batch", "lr", "weight_decay", "amp", "seed")
    return {
        **{name: getattr(settings, name) for name in names},
        "layers": list(settings.layers),
        "image_size": list(settings.image_size),
        "steps": steps,
        **pictures.describe(),
    }


def _check_size(size: tuple[int, int], config: ModelConfig) -> None:
    least = config.preprocessing.least_side
    if min(size) < least:
        raise ConfigError(
            f"image_size must be at least {least} px high and wide, of which the teacher has one patch under this "
            f"recipe; got {list(size)} (give a larger --image-size)"
        )


@contextmanager
def _shared_cpus(config: ModelConfig | None) -> Iterator[None]:
    """Where student and teacher share this machine's CPUs, each has half of them."""
    threads = torch.get_num_threads()
    if config is not None and not torch.cuda.is_available():
        torch.set_num_threads(max(1, min(threads, usable_cpus()) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _serving(
    settings: DistillSettings, config: ModelConfig | None, device: torch.device, display: Display
) -> Iterator[RemoteTeacher]:
    """The running pool that was named, or one that is started for this run and ends with it."""
    if config is None:
        assert settings.pool is not None
        with RemoteTeacher(settings.pool, address=settings.address, namespace=settings.namespace) as teacher:
            yield teacher
        return
    with display.phase("starting the teacher"):
        pool = TeacherPool.start(
            config,
            name=f"distill-{secrets.token_hex(4)}",
            address=settings.address,
            **_room_for(settings.replicas, beside=device if settings.address is None else None),
        )
    with pool:
        yield pool.teacher()


def _room_for(replicas: int | str | tuple[int, int], beside: torch.device | None) -> dict[str, Any]:
    """What a pool on this machine takes of its GPUs, so that the student on ``beside`` has one, or half of the one."""
    if beside is None or beside.type != "cuda":
        return {"replicas": replicas}
    if torch.cuda.device_count() > 1:
        return {"replicas": replicas, "leave_gpus": 1}
    count = 1 if isinstance(replicas, str) else replicas if isinstance(replicas, int) else replicas[1]
    return {"replicas": count, "num_gpus": math.floor(5000 / count) / 1e4}  # Ray counts in ten-thousandths


def _alone(recipe: recipes.Recipe, images: int) -> recipes.Recipe:
    """The recipe where no task is learnt beside it, so that no gradient can be shared; queues fit the images."""
    terms = tuple(
        replace(term, queue=max(1, images // 4)) if term.queue and images <= _FEW else term for term in recipe.terms
    )
    return replace(recipe, share=None, terms=terms)


def _device(name: str) -> torch.device:
    if name != "auto":
        return as_device(name)
    # Ray hands out the first GPUs first: of several, the student has the last one to itself.
    return as_device(f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu")


def _tapped(backbone: StudentBackbone, layers: tuple[str, ...], stride: int | None) -> list[str] | None:
    """The names within ``backbone`` of layers that the user names within the network; or that of its coarsest map.

    None leaves it to the recipe, which wants a stride that no map has.
    """
    if not layers:
        if backbone.last_level is None:
            names = layer_names(backbone.net)
            raise ConfigError(
                f"layers must name the layers to compare where the student gives no maps [B,C,h,w]; it has, among "
                f"others, {', '.join(names[-5:])} (training.taps.layer_names(student) lists all)"
            )
        level = backbone.last_level if stride is None else backbone.level_of(stride)
        return None if level is None else [level]
    known = layer_names(backbone.net)
    for name in layers:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
            raise ConfigError(f"layers must name layers of the student; it has no {name!r}. Near it: {', '.join(near)}")
    return [f"net.{name}" for name in layers]


class _BackboneJob:
    """What :func:`distill_backbone` does once all but the teacher is there: mistakes are reported before that."""

    def __init__(
        self,
        settings: DistillSettings,
        folder: RunFolder,
        recipe: recipes.Recipe,
        pictures: Pictures,
        labelled: LabelledPictures | None,
        done: DistillSummary | None,
        display: Display,
        interrupts: Interrupts,
    ) -> None:
        self.settings, self.folder = settings, folder
        self.recipe = _alone(recipe, len(pictures))
        self.pictures, self.labelled, self.done = pictures, labelled, done
        self.display, self.interrupts = display, interrupts
        self.device = _device(settings.device)
        self.amp = choose_amp(settings.amp, self.device)
        torch.manual_seed(settings.seed)
        with display.phase(f"making the student {settings.student}"):
            self.student = open_student(
                settings.student,
                pretrained=settings.pretrained,
                normalize=settings.normalize,
                size=settings.image_size,
            )
        self.backbone = self.student.backbone.to(self.device)
        self.layers = _tapped(self.backbone, settings.layers, recipe.stride)
        workers = settings.workers
        self.workers = max(1, min(_MOST_WORKERS, usable_cpus() // 2)) if workers is None else workers
        self.unreadable: dict[str, str] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.scored_on: Mapping[str, Any] | None = None
        self.seconds = 0.0
        self.state = folder.checkpoint()
        if self.state is not None:
            if labelled is not None:
                labelled.check_same(self.state["scored_on"], folder.path)
            with self._same_student():
                self.backbone.load_state_dict(self.state["student"])
        elif done is not None:
            raise ConfigError(
                f"evaluate must be given before a run is finished; {folder.path} is, and has no {CHECKPOINT} any more "
                "to score (choose another out)"
            )

    @contextmanager
    def _same_student(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, RuntimeError, ValueError) as error:  # torch's, of states that do not fit
            why = textwrap.shorten(str(error), 300, placeholder=" ...")
            raise CheckpointError(
                f"student {self.settings.student!r} is no longer that of {self.folder.join(CHECKPOINT)}: {why} (make "
                "it what it was, or choose another out)"
            ) from error

    def run(self, teacher: RemoteTeacher, steps: int) -> DistillSummary:
        settings = self.settings
        views = ViewDataset(self.pictures, Augmentation(settings.image_size), settings.seed)
        example, self.unreadable = views[0]
        distiller = self.recipe.for_student(self.backbone, teacher, example[None].to(self.device), layers=self.layers)
        training = TrainingRun(
            self.backbone,
            distiller,
            Schedule(settings.lr, steps, warmup=max(1, round(_WARMUP * steps))),
            weight_decay=settings.weight_decay,
            device=self.device,
            amp=self.amp,
        )
        pooled_layer = self.backbone.last_level or distiller.tap.names[-1]
        if self.state is None:
            self._evaluate("before", pooled_layer, teacher)
            torch.manual_seed(settings.seed)  # whatever was drawn before: a resumed run starts from the saved state
            self._save(training)
        else:
            self._load(training, self.state)
            self.display.note(f"resuming {self.folder.path} after step {training.step} of {steps}")
        self.folder.cut_metrics(training.step)
        if training.step < steps:
            batches = view_batches(
                views,
                batch=settings.batch,
                first=training.step,
                last=steps,
                workers=self.workers,
                pin=self.device.type == "cuda",
            )
            targets = prefetch(
                teacher, batches, recipe=self.recipe, images=lambda batch: batch["images"], device=self.device
            )
            with self.display.training(steps, training.step) as report, distiller.tap:
                self._train(training, targets, report)
        self._evaluate("after", pooled_layer, teacher)
        return self._finish(teacher, steps)

    def _train(self, training: TrainingRun, batches: Prefetch[Any, Any], report: StepReport) -> None:
        settings, first, begun = self.settings, training.step, time.monotonic()
        before, told = self.seconds, len(self.unreadable) if first else 0
        steps = training.schedule.steps
        log_every = max(1, min(_LOG_EVERY, steps // 10))
        try:
            with closing(iter(batches)) as stream:  # type: ignore[type-var]
                for batch, targets in stream:
                    with self.interrupts.held():  # between two steps, the state is whole
                        training.distiller.set_epoch(training.step * settings.batch // len(self.pictures))
                        training.do_step(batch["images"], targets)
                        self.unreadable |= batch["unreadable"]
                        self.seconds = before + time.monotonic() - begun
                        rate = settings.batch * (training.step - first) / max(1e-9, self.seconds - before)
                        waiting = batches.statistics().wait_share
                        last = training.step == steps
                        loss = training.mean_loss
                        if last or training.step % log_every == 0:
                            loss = partial(float, training.mean_loss())
                            self._add_row(training, loss(), rate, waiting)
                        if last or training.step % settings.save_every == 0:
                            self._save(training)
                    self.interrupts.check()
                    report(training.step, loss, rate, waiting)
                    told = self._tell_unreadable(told)
        except KeyboardInterrupt:
            self._save(training)
            raise

    def _add_row(self, training: TrainingRun, loss: float, rate: float, waiting: float) -> None:
        epoch = training.step * self.settings.batch / len(self.pictures)
        values = (training.step, epoch, loss, training.rate, rate, waiting)
        self.folder.add_metrics(dict(zip(COLUMNS, values, strict=True)))
        training.forget_losses()

    def _tell_unreadable(self, told: int) -> int:
        for name, why in list(self.unreadable.items())[told:_TOLD]:
            self.display.note(f"cannot be read: {name} ({why})")
        if told <= _TOLD < len(self.unreadable):
            self.display.note(f"more images cannot be read; {SUMMARY} is going to have all")
        return len(self.unreadable)

    def _save(self, training: TrainingRun) -> None:
        own = {"unreadable": self.unreadable, "seconds": self.seconds}
        own |= {"scores": self.scores, "scored_on": self.scored_on}
        self.folder.save({**training.state_dict(), **own})

    def _load(self, training: TrainingRun, state: Mapping[str, Any]) -> None:
        self.unreadable, self.seconds = state["unreadable"], state["seconds"]
        self.scores, self.scored_on = state["scores"], state["scored_on"]
        with self._same_student():
            training.load_state_dict(dict(state))

    def _evaluate(self, when: Literal["before", "after"], layer: str, teacher: RemoteTeacher) -> None:
        if self.labelled is None:
            return
        with self.display.phase(f"evaluating on {self.settings.evaluate}, {when} training"):
            self.scored_on = self.labelled.describe()
            batches = self.labelled.batches(self.settings.batch, self.workers)
            self.scores[when] = asdict(score(_pooled(self.backbone, layer, self.device), batches))
            if "teacher" not in self.scores:
                self.scores["teacher"] = asdict(teacher_features(teacher, batches))

    def _finish(self, teacher: RemoteTeacher, steps: int) -> DistillSummary:
        if self.done is not None:
            summary = replace(self.done, scores=self.scores, scored_on=self.scored_on)
            self.folder.write_json(SUMMARY, asdict(summary))
            return summary
        losses = [row["loss"] for row in self.folder.metrics()]
        some = max(1, len(losses) // 10)
        weights = self.folder.write_student(self.student.write)
        summary = DistillSummary(
            teacher=teacher.info.description,
            fingerprint=teacher.fingerprint,
            student=self.settings.student,
            framework=self.student.framework,
            recipe=self.recipe.name,
            weights=str(weights),
            usage=self.student.usage.format(folder=weights),
            mean=self.backbone.statistics[0],
            std=self.backbone.statistics[1],
            images=len(self.pictures),
            unreadable=self.unreadable,
            steps=steps,
            batch=self.settings.batch,
            first_loss=sum(losses[:some]) / some,
            last_loss=sum(losses[-some:]) / some,
            seconds=round(self.seconds, 3),
            scores=self.scores,
            scored_on=self.scored_on,
            resumed=self.state is not None,
        )
        self.folder.write_json(SUMMARY, asdict(summary))
        return summary


def _pooled(backbone: StudentBackbone, layer: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What makes vectors [B, D] of images: the means of ``layer``'s maps, with the student as it is used later."""

    def features(images_B3HW: Tensor) -> Tensor:
        training = backbone.training
        with torch.no_grad(), FeatureTap(backbone, layer) as tap:
            backbone.eval()(images_B3HW.to(device))
            found = tap.take()
        backbone.train(training)
        return found if found.ndim == 2 else found.flatten(2).mean(2) if found.ndim == 4 else found.mean(1)

    return features
