"""The time of a training step with its teacher in a pool, over that of the same step without a teacher.

Student and teachers are simulated: devices that are busy for a given time. A ratio above 1.0 is therefore the time that
the loop waits for targets, and the time that handing over images and targets costs it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dinov3_ray.bench.printout import describe_machine, new_table
from dinov3_ray.bench.simulated import SPEC, Accelerator, Work, simulated_pool
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.teacher import Extractor
from dinov3_ray.training.prefetch import Prefetch

__all__ = [
    "EPOCH",
    "KINDS",
    "LoopPass",
    "PoolTimings",
    "StepLoops",
    "TrainingSetting",
    "TrainingTimings",
    "measure_training",
]


#: The ways in which a loop gets its targets, in the order in which they are measured and shown.
KINDS = ("teacher-free", "prefetch", "in-loop teacher", "submit in the step")

_FORWARD = 1 / 3  # of a step: the part that overlaps with a batch that is submitted in the step
_SLOW_STEPS = 4  # slow kinds get a fourth of the steps
EPOCH = 1000
"""Steps of a long epoch; its ratio, with its fill, is computed from what was measured."""


@dataclass(frozen=True, slots=True)
class TrainingSetting:
    """What is measured.

    Attributes:
        replicas: their number in the pool.
        steps: steps per pass over the loader.
        repeats: passes per kind, in turn, after a short one to warm up.
        step_seconds: the student's time per step.
        in_loop: a teacher's time per step on the student's own device, over the student's time.
        capacity: the rate of the whole pool over what the student needs. A replica takes ``replicas / capacity`` steps
            per batch.
    """

    replicas: int = 2
    steps: int = 40
    repeats: int = 3
    step_seconds: float = 0.3
    in_loop: float = 1.0
    capacity: float = 1.5

    @property
    def work(self) -> Work:
        return Work(self.steps, replicas=self.replicas, seconds=self.step_seconds * self.replicas / self.capacity)


@dataclass(frozen=True, slots=True)
class LoopPass:
    """One pass over the loader.

    Attributes:
        steps: their number.
        fill: seconds until the first step began; with prefetch, until the first batch had its targets.
        seconds: from then to the end.
        wait_share: the share of ``seconds`` spent waiting, as the prefetch counts it; 0 without one.
    """

    steps: int
    fill: float
    seconds: float
    wait_share: float = 0.0

    @property
    def step(self) -> float:
        """Seconds per step, without the fill."""
        return self.seconds / self.steps

    def step_of_epoch(self, steps: int) -> float:
        """Seconds per step in an epoch of ``steps``, with the fill."""
        return self.fill / steps + self.step


@dataclass(frozen=True, slots=True)
class PoolTimings:
    """The passes of each kind. The kinds took turns, so that passes with the same index belong together."""

    setting: TrainingSetting
    passes: dict[str, list[LoopPass]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def ratios(self, kind: str) -> list[float]:
        """The time of a step over that of a teacher-free step, without the fill, one value per pass."""
        return [each.step / free.step for each, free in self._pairs(kind)]

    def epoch_ratio(self, kind: str, steps: int) -> float:
        """The median ratio over an epoch of ``steps``, with the fill."""
        pairs = self._pairs(kind)
        return statistics.median(each.step_of_epoch(steps) / free.step_of_epoch(steps) for each, free in pairs)

    def median(self, kind: str, of: Callable[[LoopPass], float]) -> float:
        return statistics.median(map(of, self.passes[kind]))

    def as_dict(self) -> dict[str, Any]:
        """The setting, and for each kind the medians and the values that they are medians of."""
        return asdict(self.setting) | {
            "teacher_seconds": self.setting.work.seconds,
            "kinds": {
                kind: {
                    "step_seconds": self.median(kind, lambda each: each.step),
                    "ratio": statistics.median(self.ratios(kind)),
                    "ratios": self.ratios(kind),
                    "wait_share": self.median(kind, lambda each: each.wait_share),
                    "fill_seconds": self.median(kind, lambda each: each.fill),
                    "ratio_with_fill": {
                        str(steps): self.epoch_ratio(kind, steps) for steps in (self.setting.steps, EPOCH)
                    },
                    "passes": [asdict(each) for each in self.passes[kind]],
                }
                for kind in KINDS
            },
        }

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The cells of the table: kind, ms per step, ratio, share of waiting, seconds of fill, ratio with the fill."""
        for kind in KINDS:
            yield (
                kind,
                f"{1e3 * self.median(kind, lambda each: each.step):.1f}",
                f"{statistics.median(self.ratios(kind)):.3f}",
                f"{self.median(kind, lambda each: each.wait_share):.1%}" if kind == "prefetch" else "-",
                f"{self.median(kind, lambda each: each.fill):.2f}",
                f"{self.epoch_ratio(kind, self.setting.steps):.3f}",
            )

    def _pairs(self, kind: str) -> list[tuple[LoopPass, LoopPass]]:
        return list(zip(self.passes[kind], self.passes[KINDS[0]], strict=True))

    def table(self) -> Table:
        """One row per kind."""
        setting = self.setting
        table = new_table(
            f"{setting.replicas} replicas of {setting.work.seconds * 1e3:g} ms per batch, together "
            f"{setting.capacity:g} times what a student of {setting.step_seconds * 1e3:g} ms per step needs",
            f"ratios over teacher-free; medians of {setting.repeats} passes of {setting.steps} steps (the last "
            f"two kinds: a fourth), after a short one\nprefetch over an epoch of {EPOCH:,} steps, its fill included: "
            f"{self.epoch_ratio('prefetch', EPOCH):.3f} (computed)\n{describe_machine()}",
            *("", "ms per step", "ratio", "waiting", "fill, s", "ratio with fill"),
        )
        for row in self.rows():
            table.add_row(*row)
        return table


@dataclass(frozen=True, slots=True)
class TrainingTimings:
    """The timings of several pools."""

    pools: list[PoolTimings]

    def as_dict(self) -> dict[str, Any]:
        return {"machine": describe_machine(), "pools": [timings.as_dict() for timings in self.pools]}

    def tables(self) -> list[Table]:
        """One table per pool."""
        return [timings.table() for timings in self.pools]


def measure_training(settings: Sequence[TrainingSetting], on_kind: Callable[[str], None]) -> TrainingTimings:
    """Measure in the Ray that this process is connected to, one pool per setting."""
    return TrainingTimings([_measure(setting, on_kind) for setting in settings])


def _measure(setting: TrainingSetting, on_kind: Callable[[str], None]) -> PoolTimings:
    work = setting.work
    with simulated_pool(work, "bench-training") as pool:
        loops = _simulated_loops(setting)
        loops.remote = pool.teacher()
        timings = PoolTimings(setting)
        for repeat in range(setting.repeats + 1):
            for kind in KINDS:
                on_kind(f"{kind}, {setting.replicas} replicas, pass {repeat} of {setting.repeats}")
                slow = kind not in KINDS[:2]
                few = max(1, setting.steps // _SLOW_STEPS)
                seen = loops.run(kind, few if slow or not repeat else setting.steps)
                if repeat:
                    timings.passes[kind].append(seen)
    return timings


def _simulated_loops(setting: TrainingSetting) -> StepLoops:
    images = setting.work.images()
    loops = StepLoops(
        lambda _: images.clone(),
        lambda _images, _targets, share: time.sleep(share * setting.step_seconds),
    )
    loops.local = Accelerator(Work(rows=setting.work.rows, seconds=setting.in_loop * setting.step_seconds))
    return loops


Load = Callable[[int], Tensor]
"""Gives the images of a step, by its number."""

Compute = Callable[[Tensor, Features | None, float], None]
"""Computes a share of a step from its images and, where there are any, their targets."""


class StepLoops:
    """The training loops that are compared. Each sees the same batches, and yields when a step begins.

    Args:
        load: see :data:`Load`; called by the loop, or ahead of it by the prefetch.
        student: see :data:`Compute`.
        finish: waits until the student's device has done what it was given.
        spec: of the targets.
        device: to which a prefetch delivers them; None leaves them on the host.

    Attributes:
        local: the teacher in the loop; None before one is measured.
        remote: the client of a pool; likewise.
    """

    def __init__(
        self,
        load: Load,
        student: Compute,
        *,
        finish: Callable[[], None] = lambda: None,
        spec: FeatureSpec = SPEC,
        device: torch.device | None = None,
    ) -> None:
        self._load, self._student, self._finish = load, student, finish
        self._spec, self._device = spec, device
        self._wait_share = 0.0
        self.local: Extractor | None = None
        self.remote: RemoteTeacher | None = None

    def run(self, kind: str, steps: int) -> LoopPass:
        """One pass of ``steps`` steps, of one of :data:`KINDS`."""
        loops: dict[str, Callable[[int], Iterator[None]]] = {
            "teacher-free": self._teacher_free,
            "prefetch": self._prefetched,
            "in-loop teacher": self._in_loop,
            "submit in the step": self._submitting,
        }
        self._wait_share = 0.0
        begun = first = time.perf_counter()
        done = 0
        for done, _ in enumerate(loops[kind](steps), 1):
            if done == 1:
                first = time.perf_counter()
        self._finish()
        ended = time.perf_counter()
        assert done == steps, f"{kind}: {done} steps of {steps}"
        return LoopPass(steps, first - begun, ended - first, self._wait_share)

    def _teacher_free(self, steps: int) -> Iterator[None]:
        for number in range(steps):
            images = self._load(number)
            yield
            self._student(images, None, 1.0)

    def _prefetched(self, steps: int) -> Iterator[None]:
        assert self.remote is not None
        batches = map(self._load, range(steps))
        stream: Prefetch[Tensor, Features]
        stream = self.remote.prefetch(batches, self._spec, images=lambda images: images, device=self._device)
        for images, targets in stream:
            assert targets.feature_map is not None
            yield
            self._student(images, targets, 1.0)
        self._wait_share = stream.statistics().wait_share

    def _in_loop(self, steps: int) -> Iterator[None]:
        assert self.local is not None
        for number in range(steps):
            images = self._load(number)
            yield
            self._student(images, self.local.extract(images, self._spec), 1.0)

    def _submitting(self, steps: int) -> Iterator[None]:
        assert self.remote is not None
        for number in range(steps):
            images = self._load(number)
            yield
            handle = self.remote.submit(images, self._spec)
            self._student(images, None, _FORWARD)
            self._student(images, handle.result(), 1 - _FORWARD)
