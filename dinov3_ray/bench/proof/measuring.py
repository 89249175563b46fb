"""The proof from end to end: scenes, teachers in pools, their maps through prefetch, and all arms with all seeds.

Shapes: S scenes, D channels, a grid of h × w patches, y × x cells.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from dinov3_ray.bench.proof.arms import ARMS, ProofSettings, TeacherName, train_arm
from dinov3_ray.bench.proof.outcome import SHOWN, Proof, Score
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.config import DinoV3Config
from dinov3_ray.features import FeatureSpec
from dinov3_ray.interrupts import wait
from dinov3_ray.machine.cpus import usable_cpus
from dinov3_ray.pool.teacher_pool import TeacherPool
from dinov3_ray.scenes.scene_teacher import TeachingReport, cached_teacher
from dinov3_ray.scenes.scenery import Scenery, draw_scenery
from dinov3_ray.scenes.segmentation import mean_iou, predict_by_probe
from dinov3_ray.scenes.student import Student

__all__ = ["measure_proof"]

_SPEC = FeatureSpec(feature_map=True, dtype="float32")
_FIRST_LABELLED, _FIRST_UNSEEN = 2_000_000, 3_000_000  # numbers of scenes; the teacher's own are others
_PER_PASS = 100  # scenes

Note = Callable[[str], None]


def measure_proof(
    settings: ProofSettings,
    folder: Path,
    ray: Callable[[], AbstractContextManager[object]] | None,
    note: Note,
    *,
    cache: Path | None = None,
) -> Proof:
    """Train all arms with all seeds, and measure them.

    Args:
        folder: for what is needed meanwhile.
        ray: gives a context in which this process is connected to Ray; None has the pools in this process, without it.
        note: called with a line for each step.
        cache: the folder of the trained teacher; by default the user's.

    Raises:
        CheckpointError, ConfigError, PoolError: the cache, a setting or the cluster is wrong.
    """
    teaching = settings.teaching
    note("looking for the teacher that knows the scenes")
    roots: dict[TeacherName, Path] = {
        "trained": cached_teacher(teaching, _in_tenths(note), folder=cache),
        "random": init_checkpoint(teaching.variant, folder / "random", seed=teaching.seed, image_size=teaching.side),
    }
    note(f"drawing {settings.unlabelled} scenes without labels, {settings.unseen} to measure on, and those with labels")
    unlabelled = draw_scenery(0, settings.unlabelled, teaching.side)
    labelled = draw_scenery(_FIRST_LABELLED, settings.seeds * settings.labels, teaching.side)
    unseen = draw_scenery(_FIRST_UNSEEN, settings.unseen, teaching.side)
    maps: dict[TeacherName, Sequence[Tensor]] = {}
    with ray() if ray is not None else nullcontext():
        for name, root in roots.items():
            note(f"the {name} teacher's maps, through a pool")
            maps[name] = _through_pool(root, name, (unlabelled, labelled, unseen), settings, local_mode=ray is None)
    labels = [labelled[settings.labels * seed : settings.labels * (seed + 1)] for seed in range(settings.seeds)]
    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise CancelledError

    def probe_teacher(name: TeacherName, seed: int) -> Score:
        _, labelled_SDhw, unseen_SDhw = maps[name]
        of_seed_SDhw = labelled_SDhw[settings.labels * seed : settings.labels * (seed + 1)]
        return _probed(of_seed_SDhw, labels[seed], unseen_SDhw, unseen)

    def probe_student(name: str, seed: int) -> Score:
        arm = ARMS[name]
        targets = maps[arm.teacher][0] if arm.teacher else None
        student = train_arm(arm, seed, labels[seed], unlabelled.pictures, targets, settings, check)
        return _probed(_map_of(student, labels[seed]), labels[seed], _map_of(student, unseen), unseen)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # per arm; as many arms as there are CPUs train at once
    seeds = range(settings.seeds)
    workers = ThreadPoolExecutor(usable_cpus(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        of_teachers = {name: [workers.submit(probe_teacher, name, seed) for seed in seeds] for name in roots}
        of_arms: dict[str, list[Future[Score]]] = {name: [] for name in ARMS}
        for seed, arm in product(seeds, ARMS):
            of_arms[arm].append(workers.submit(probe_student, arm, seed))
        titles = {
            future: f"{ARMS[name].title}, seed {seed}"
            for name, scored in of_arms.items()
            for seed, future in enumerate(scored)
        }
        note(f"training {len(titles)} students")
        for done, future in enumerate(_as_completed(titles), start=1):
            note(f"{done} of {len(titles)}: {titles[future]}: mIoU {future.result().miou:.1%}")
        return Proof(
            settings,
            {name: [future.result() for future in scored] for name, scored in of_arms.items()},
            {name: [future.result() for future in scored] for name, scored in of_teachers.items()},
            unseen[:SHOWN],
        )
    finally:
        stopped.set()
        workers.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _through_pool(
    root: Path, name: str, given: Sequence[Scenery], settings: ProofSettings, *, local_mode: bool
) -> Sequence[Tensor]:
    """The teacher's maps, float32 [S,D,h,w], of each of ``given``."""
    loader = torch.split(torch.cat([scenes.pictures for scenes in given]), settings.batch)
    pool = TeacherPool.start(
        DinoV3Config(root, dtype="float32"),
        name=f"proof-{name}-{secrets.token_hex(4)}",
        replicas=settings.replicas,
        num_gpus=0,
        local_mode=local_mode,
    )
    with pool, pool.teacher() as teacher:
        found = [features.feature_map for _, features in teacher.prefetch(loader, _SPEC, images=lambda batch: batch)]
    maps_SDhw = torch.cat([map_BDhw for map_BDhw in found if map_BDhw is not None])
    return torch.split(maps_SDhw, [len(each) for each in given])


def _map_of(student: Student, scenes: Scenery) -> Tensor:
    with torch.no_grad():
        return torch.cat([student.features(pictures) for pictures in torch.split(scenes.pictures, _PER_PASS)])


def _probed(map_SDhw: Tensor, labelled: Scenery, unseen_SDhw: Tensor, unseen: Scenery) -> Score:
    predicted_Syx = predict_by_probe(map_SDhw, labelled.labels, unseen_SDhw)
    return Score(mean_iou(predicted_Syx, unseen.labels), predicted_Syx[:SHOWN].clone())


def _as_completed(scored: Iterable[Future[Score]]) -> Iterator[Future[Score]]:
    """As of ``concurrent.futures``, but a signal that the system delivers to another thread ends its waits, too."""
    left = set(scored)
    while left:
        wait(lambda seconds: bool(futures.wait(left, seconds, futures.FIRST_COMPLETED).done))
        done = {future for future in left if future.done()}
        left.difference_update(done)
        yield from done


def _in_tenths(note: Note) -> TeachingReport:
    def report(done: int, of: int) -> None:
        if 10 * done // of > 10 * (done - 1) // of:
            note(f"making the teacher that knows the scenes, once: {done / of:.0%}")

    return report
