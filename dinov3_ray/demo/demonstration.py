"""The demonstration: a pool of teachers, a student, and a training loop that prefetches its targets.

Shapes: B views, D teacher channels, h × w the teacher's grid.
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.config import open_config
from dinov3_ray.demo.ephemeral_ray import DemoRay, gpus_per_replica, make_folder, remove_folder
from dinov3_ray.demo.photographs import read_photographs
from dinov3_ray.demo.report import Summary, save_loss_curve, save_maps, save_summary
from dinov3_ray.demo.views import Views
from dinov3_ray.distillation.augmentation import crop_centre
from dinov3_ray.distillation.display import Display
from dinov3_ray.errors import ConfigError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.interrupts import Interrupts
from dinov3_ray.machine.cpus import usable_cpus
from dinov3_ray.pictures import make_out_folder
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.pool.teacher_pool import TeacherPool
from dinov3_ray.scenes.drawing import draw_scene
from dinov3_ray.scenes.learning_rate import rate_factor
from dinov3_ray.scenes.scene_teacher import SceneTeaching, cached_teacher
from dinov3_ray.scenes.scenery import draw_scenery, relit
from dinov3_ray.scenes.segmentation import mean_iou, predict_by_probe
from dinov3_ray.scenes.student import Student
from dinov3_ray.training.losses import DistillationLoss

__all__ = ["DemoSettings", "run_demo"]

log = logging.getLogger("dinov3_ray")

_SPEC = FeatureSpec(feature_map=True)
_VARIANT, _IMAGE_SIZE = "vit-test", 256  # a pass of a batch takes a CPU core a fraction of a second
_SCENES, _SHOWN = 40, 4
_MANY_SCENES, _SCENE_SIDE = 200, 160  # for the teacher that knows them, whose images are small
_PROBE_SCENES = ((10_000, 64), (20_000, 100))  # (first, count): those with labels, and those to measure on
_MOST_PHOTOGRAPHS = 200
_LEARNING_RATE = 4e-3


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """The options of ``dinov3-ray demo``; their help explains them."""

    out: Path
    images: Path | None = None
    root: str | Path | None = None
    revision: str | None = None
    steps: int = 150
    seconds: float = 40.0
    replicas: int = 2
    batch: int = 8
    address: str | None = None
    trained: bool = False

    def __post_init__(self) -> None:
        if self.trained and (self.root is not None or self.images is not None):
            name, value = ("--images", self.images) if self.root is None else ("--root", self.root)
            raise ConfigError(f"--trained has a teacher of its own, for drawn scenes: leave out {name}; got {value}")


@dataclass(frozen=True, slots=True)
class _Trained:
    """The result of the training loop; the loss of each step, and seconds in total."""

    losses: tuple[float, ...]
    wait_share: float
    seconds: float


def run_demo(settings: DemoSettings, display: Display, interrupts: Interrupts) -> Summary:
    """Run the demonstration and write its files to ``settings.out``.

    However it ends, its pool and the Ray that it started have ended when it returns or raises.

    Raises:
        ConfigError, CheckpointError, InputError, PoolError: an option, a file or the cluster is wrong.
        KeyboardInterrupt: a signal arrived.
    """
    begun = time.monotonic()
    make_out_folder(settings.out)
    root = _trained_teacher(display) if settings.trained else settings.root
    with interrupts.held():
        folder = make_folder()
        ray = DemoRay(settings.address, folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(threads, usable_cpus()) // 2))  # the replicas use the other half of the cores
    log.addFilter(_is_not_a_prefetch_hint)
    # Twice: an interrupt may cut the first cleanup short, and the second one completes it.
    try:
        try:
            return _run(root, settings, display, interrupts, ray, folder, begun)
        finally:
            _clean_up(ray, folder)
    finally:
        _clean_up(ray, folder)
        log.removeFilter(_is_not_a_prefetch_hint)
        torch.set_num_threads(threads)


def _run(
    root: str | Path | None,
    settings: DemoSettings,
    display: Display,
    interrupts: Interrupts,
    ray: DemoRay,
    folder: Path,
    begun: float,
) -> Summary:
    root = root or init_checkpoint(_VARIANT, folder / "teacher", image_size=_IMAGE_SIZE)
    config = open_config(root, revision=settings.revision)
    pictures, shown = _pictures(settings, display, max(config.nominal_size))
    torch.manual_seed(0)
    student = Student(config.hidden_size)
    before = _probed(student, config.nominal_size[0], display) if settings.trained else None
    with display.phase(f"{'starting' if ray.embedded else 'joining'} Ray"):
        ray.start()
    name = f"demo-{secrets.token_hex(4)}"
    with display.phase(f"starting {settings.replicas} teachers"):
        pool = TeacherPool.start(
            config, name=name, replicas=settings.replicas, num_gpus=gpus_per_replica(settings.replicas, ray.free_gpus)
        )
    with pool:
        teacher = pool.teacher()
        views = Views(pictures, config.nominal_size, batch=settings.batch, steps=settings.steps, seed=0)
        trained = _train(student, teacher, views, settings, display, interrupts)
        centres = [crop_centre(picture, config.nominal_size) for picture in shown]
        teacher_map = teacher.extract_feature_map(torch.stack(centres))
        described, fingerprint = teacher.info.description, teacher.fingerprint
    save_maps(settings.out, centres, teacher_map, _map_of(student, torch.stack(centres)))
    save_loss_curve(settings.out, trained.losses)
    after = _probed(student, config.nominal_size[0], display) if settings.trained else None
    tail = trained.losses[-max(1, len(trained.losses) // 10) :]
    summary = Summary(
        teacher=described,
        fingerprint=fingerprint,
        replicas=settings.replicas,
        pictures=len(pictures),
        batch=settings.batch,
        losses=trained.losses,
        first_loss=trained.losses[0],
        last_loss=sum(tail) / len(tail),
        images_per_second=len(trained.losses) * settings.batch / trained.seconds,
        wait_share=trained.wait_share,
        training_seconds=trained.seconds,
        total_seconds=time.monotonic() - begun,
        probe_before=before,
        probe_after=after,
    )
    save_summary(settings.out, summary)
    return summary


def _train(
    student: Student,
    teacher: RemoteTeacher,
    views: Views,
    settings: DemoSettings,
    display: Display,
    interrupts: Interrupts,
) -> _Trained:
    distill = DistillationLoss("cosine", align="teacher")
    optimizer = torch.optim.AdamW(student.parameters(), lr=_LEARNING_RATE)
    losses: list[float] = []
    begun = time.monotonic()
    prefetch = teacher.prefetch(views, _SPEC, images=lambda views_B3HW: views_B3HW)
    with display.training(len(views)) as report:
        for views_B3HW, targets in prefetch:
            spent = (time.monotonic() - begun) / settings.seconds
            # Of steps or time, whichever is further: the rate is low when training ends for either reason.
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * rate_factor(max(len(losses) / settings.steps, spent))
            loss = distill(student(views_B3HW), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            interrupts.check()
            seconds = time.monotonic() - begun
            report(len(losses), loss.item, settings.batch * len(losses) / seconds, prefetch.statistics().wait_share)
            if seconds > settings.seconds and len(losses) > 1:
                break  # on a slow or busy machine the time is up before the steps are done
    return _Trained(tuple(losses), prefetch.statistics().wait_share, time.monotonic() - begun)


def _map_of(student: Student, views_B3HW: Tensor) -> Tensor:
    with torch.no_grad():
        map_BDhw: Tensor = student.eval()(views_B3HW)
    return map_BDhw


def _trained_teacher(display: Display) -> Path:
    """The model directory of the teacher that knows the scenes, from this user's cache; made now if it is not there."""

    def report(done: int, of: int) -> None:
        if 10 * done // of > 10 * (done - 1) // of:
            display.note(f"making a teacher that knows the scenes, once for this user: {done / of:.0%}")

    return cached_teacher(SceneTeaching(), report)


def _probed(student: Student, side: int, display: Display) -> float:
    """The mIoU of a linear probe on the student's map, in eval mode, on scenes that nothing was trained on."""
    with display.phase("probing the student"), torch.no_grad():
        labelled, unseen = (draw_scenery(first, count, side) for first, count in _PROBE_SCENES)
        labelled_map, unseen_map = (student.eval().features(scenes.pictures) for scenes in (labelled, unseen))
        with torch.enable_grad():
            predicted = predict_by_probe(labelled_map, labelled.labels, unseen_map)
        student.train()
        return mean_iou(predicted, unseen.labels)


def _pictures(settings: DemoSettings, display: Display, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """(Pictures to train on, pictures to show at the end); the student never sees the latter if there are enough."""
    if settings.trained:
        with display.phase(f"drawing {_MANY_SCENES} scenes"):
            found = [relit(draw_scene(seed, _SCENE_SIDE), seed) for seed in range(_MANY_SCENES)]
    elif settings.images is None:
        with display.phase(f"drawing {_SCENES} scenes"):
            found = [draw_scene(seed) for seed in range(_SCENES)]
    else:
        with display.phase(f"reading photographs in {settings.images}"):
            read = read_photographs(settings.images, at_most=_MOST_PHOTOGRAPHS, shorter_side=2 * size)
        for line in read.skipped:
            display.note(f"skipped: {line}")
        found = list(read.pictures)
    if len(found) < 2 * _SHOWN:
        return found, found[:_SHOWN]
    return found[_SHOWN:], found[:_SHOWN]


def _clean_up(ray: DemoRay, folder: Path) -> None:
    ray.close()
    remove_folder(folder)


def _is_not_a_prefetch_hint(record: logging.LogRecord) -> bool:
    """Drops the hint about waiting for the teacher: the progress bar shows it, and both share this machine's cores."""
    return record.module != "stream"
