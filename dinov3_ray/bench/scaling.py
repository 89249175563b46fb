"""The rate of a pool of simulated accelerators as the work grows, compared with the prediction of ``bench.cost``.

The costs are measured with one replica, one client, and batches of two sizes. All other points are predicted from them,
and then measured. Everything runs on one node; nothing else should run there.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from rich.table import Table

from dinov3_ray.bench.cost import COPIES, Costs, Line, Spent, Workload
from dinov3_ray.bench.printout import describe_machine, new_table
from dinov3_ray.bench.simulated import Work, simulated_pool
from dinov3_ray.features import FeatureSpec
from dinov3_ray.machine.cpus import usable_cpus
from dinov3_ray.machine.processes import PARENT, SYSTEM_TICKS, USER_TICKS, read_stat
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.pool.teacher_pool import TeacherPool

__all__ = ["QUICK", "BatchShape", "Scaling", "ScalingPlan", "ScalingPoint", "cpu_seconds", "measure_scaling"]


_NAME = "bench-scaling"
_WORK = Work()  # 40 ms for 32 images
_COPY_BYTES = 64 * 2**20
_AXES = {"replicas": "{0} replica", "batch": "batch of {0}", "map": "map {0} x {0}", "clients": "{0} client"}
_COUNTED = ("replicas", "clients")


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The shape of a batch: ``rows`` images, and maps of ``side`` x ``side``."""

    rows: int = _WORK.rows
    side: int = _WORK.side

    @property
    def work(self) -> Work:
        return replace(_WORK, rows=self.rows, side=self.side)

    @property
    def spec(self) -> FeatureSpec:
        return FeatureSpec(feature_map=True, map_size=(self.side, self.side))

    @property
    def nbytes(self) -> int:
        """Bytes of the images and the results of a batch."""
        return self.rows * 3 * _WORK.pixels**2 + self.work.result_bytes

    def load(self, replicas: int, clients: int = 1, seconds: float = _WORK.seconds) -> Workload:
        return Workload(replicas, clients, self.rows, self.nbytes, seconds * self.rows / _WORK.rows)


@dataclass(frozen=True, slots=True)
class ScalingPlan:
    """What to measure.

    Attributes:
        replicas: numbers of replicas, in rising order, each with the usual batch and one client.
        batches: numbers of images per batch, each with ``base`` replicas.
        sides: sides of maps, each with ``base`` replicas.
        clients: numbers of clients, each with ``base`` replicas.
        base: one of ``replicas``.
        seconds: the time that counts, per point.
        calibration: the two shapes that give the costs.
        network: bytes/s of a client on another node, for the calculation; nothing is sent there.
    """

    replicas: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    sides: tuple[int, ...] = (7, 14, 28, 40)
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    base: int = 4
    seconds: float = 3.0
    calibration: tuple[BatchShape, BatchShape] = (BatchShape(rows=1), BatchShape(side=28))
    network: float = 25e9 / 8


QUICK = ScalingPlan((1, 2, 4), (1, 32), (7, 28), (1, 2), base=2, seconds=1.0)


@dataclass(frozen=True, slots=True)
class ScalingPoint:
    """One measured point and its prediction; rates are batches/s of all clients together.

    Attributes:
        axis: what grows: ``replicas``, ``batch``, ``map`` or ``clients``.
        value: its value at this point.
        load: the work of the pool.
        measured: the measured rate.
        predicted: the predicted rate.
        wall: the part that limits the prediction.
        walls: the rates that each part allows by itself.
        cpu: cores that were busy; None if the system does not report it.
        slowest: the rate of the slowest client over that of the fastest.
    """

    axis: str
    value: int
    load: Workload
    measured: float
    predicted: float
    wall: str
    walls: dict[str, float]
    cpu: float | None = None
    slowest: float = 1.0

    @property
    def ratio(self) -> float:
        """The predicted rate over the measured one."""
        return self.predicted / self.measured


@dataclass(frozen=True, slots=True)
class Scaling:
    """The measured points, and the costs that they were predicted from."""

    plan: ScalingPlan
    costs: Costs
    points: tuple[ScalingPoint, ...]
    machine: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "plan": asdict(self.plan),
            "costs": asdict(self.costs),
            "points": [
                asdict(point) | {"ratio": point.ratio, "images_per_second": point.measured * point.load.rows}
                for point in self.points
            ],
            "walls": self.walls()[1],
        }

    def walls(self) -> tuple[list[BatchShape], dict[str, list[float]]]:
        """(Three shapes, and for each part the number of accelerators that it keeps busy, one number per shape)."""
        shapes = [BatchShape(side=7), BatchShape(), BatchShape(side=28)]
        names = {
            "CPU": "CPU of this node",
            "client": "one client's process",
            "memory": "memory of this node",
            "network": "one client's network",
        }
        rates = [
            (self.costs.walls(shape.load(1), self.plan.network), shape.load(1).accelerator_seconds) for shape in shapes
        ]
        return shapes, {label: [walls[name] * seconds for walls, seconds in rates] for name, label in names.items()}

    def tables(self) -> list[Table]:
        """A table of all points, and one of what each part allows by itself."""
        return [self._points_table(), self._walls_table()]

    def _points_table(self) -> Table:
        costs = self.costs
        table = Table(
            title="A pool as work grows",
            caption="MiB: a batch, in and out; ratio: predicted over measured\nsimulated accelerators, 40 ms for 32 "
            "images of 224 px; where nothing else is said, 1 client, batches of 32,\n"
            f"maps 14 x 14 and {self.plan.base} replicas\ncosts, from 1 replica and two sizes: "
            f"{_line(costs.cpu)} of CPU; of these in the client {_line(costs.client)}\n{self.machine}",
        )
        for heading in ("", "MiB", "img/s", "predicted", "ratio", "cores busy", "the wall"):
            table.add_column(heading, justify="left" if heading in ("", "the wall") else "right", no_wrap=True)
        for axis in _AXES:
            for point in self.points:
                if point.axis != axis:
                    continue
                table.add_row(
                    _AXES[axis].format(point.value) + ("s" if axis in _COUNTED and point.value > 1 else ""),
                    f"{point.load.nbytes / 2**20:.1f}",
                    f"{point.measured * point.load.rows:.0f}",
                    f"{point.predicted * point.load.rows:.0f}",
                    f"{point.ratio:.2f}",
                    "-" if point.cpu is None else f"{point.cpu:.1f}",
                    point.wall,
                )
            table.add_section()
        return table

    def _walls_table(self) -> Table:
        shapes, walls = self.walls()
        table = new_table(
            "What each part allows by itself",
            f"accelerators of 40 ms for 32 images that it feeds, batches of 32; one node of "
            f"{self.costs.cores} cores that copies {self.costs.copy_rate / 2**30:.1f} GiB/s ({COPIES} copies per byte)"
            f", clients on other nodes with {self.plan.network * 8 / 1e9:g} Gbit/s each (calculated)",
            *("", *(f"map {shape.side} x {shape.side}, {shape.nbytes / 2**20:.1f} MiB" for shape in shapes)),
        )
        for wall, fed in walls.items():
            table.add_row(wall, *(f"{number:.1f}" for number in fed))
        return table


@dataclass(frozen=True, slots=True)
class _StreamRun:
    """The counts of some seconds in the middle of an endless stream."""

    batches: int
    seconds: float
    cpu: float | None
    client: float

    @property
    def rate(self) -> float:
        return self.batches / self.seconds


def _line(line: Line) -> str:
    return f"{line.fixed * 1e3:.2f} ms per batch and {line.per_byte * 2**20 * 1e3:.3f} ms per MiB"


def measure_scaling(plan: ScalingPlan, on_step: Callable[[str], None]) -> Scaling:
    """Measure in the Ray that this process is connected to, which must be on this machine alone."""
    on_step("what batches cost")
    costs = _calibrate(plan)
    points: list[ScalingPoint] = []

    def note(axis: str, value: int, load: Workload, measured: float, cpu: float | None, slowest: float = 1.0) -> None:
        predicted, wall = costs.predict(load)
        points.append(ScalingPoint(axis, value, load, measured, predicted, wall, costs.walls(load), cpu, slowest))

    with _pool(_WORK.seconds, plan) as pool:
        remote = pool.teacher()

        def measure(axis: str, value: int, replicas: int, shape: BatchShape) -> None:
            on_step(f"{axis} {value}")
            run = _run(remote, shape, plan.seconds, replicas)
            cpu = None if run.cpu is None else run.cpu / run.seconds
            note(axis, value, shape.load(replicas), run.rate, cpu)

        for replicas in plan.replicas:
            on_step(f"start of {replicas} replicas")
            pool.scale(replicas, wait=True)
            measure("replicas", replicas, replicas, BatchShape())
            if replicas != plan.base:
                continue
            for rows in plan.batches:
                measure("batch", rows, replicas, BatchShape(rows=rows))
            for side in plan.sides:
                measure("map", side, replicas, BatchShape(side=side))
            for clients, rates, cpu in _several(plan, replicas, on_step):
                slowest = min(rates) / max(rates)
                note("clients", clients, BatchShape().load(replicas, clients), sum(rates), cpu, slowest)
    return Scaling(plan, costs, tuple(points), describe_machine())


def _pool(seconds: float, plan: ScalingPlan) -> TeacherPool:
    """Start a pool of one replica, whose device takes ``seconds`` for the usual batch."""
    most = max(*plan.batches, *(shape.rows for shape in plan.calibration), _WORK.rows)
    return simulated_pool(replace(_WORK, seconds=seconds, replicas=1), _NAME, most)


def _calibrate(plan: ScalingPlan) -> Costs:
    """Measure the costs with one replica whose device takes no time."""
    cores = usable_cpus()
    with _pool(0.0, plan) as pool:
        remote = pool.teacher()
        # The larger one first: it touches the store's memory for the first time, which costs more.
        large, small = (
            _spent(shape, _run(remote, shape, plan.seconds, 1), cores) for shape in reversed(plan.calibration)
        )
    return Costs.calibrated(cores, _copy_rate(cores), small, large)


def _spent(shape: BatchShape, run: _StreamRun, cores: int) -> Spent:
    """The costs of one run; all cores count as busy if the system does not report it."""
    cpu = run.seconds * cores if run.cpu is None else run.cpu
    return Spent(shape.nbytes, cpu / run.batches, run.client / run.batches)


def _run(remote: RemoteTeacher, shape: BatchShape, seconds: float, replicas: int) -> _StreamRun:
    """Run a stream and count its middle, so that neither its fill nor its end counts."""
    images = shape.work.images()

    def endless() -> Iterator[None]:
        while True:
            yield None

    stream = remote.prefetch(endless(), shape.spec, images=lambda _: images)
    begun = time.perf_counter()
    skipped, first = 0, None
    for batches, _ in enumerate(stream):
        now = time.perf_counter()
        if first is None:
            # By then each replica has had its turn, and the client knows its speed.
            if batches >= 4 * replicas and now - begun >= seconds / 3:
                skipped, first, cpu, client = batches, now, cpu_seconds(), time.process_time()
        elif now - first >= seconds and batches - skipped >= 2 * replicas:
            after = cpu_seconds()
            spent = None if cpu is None or after is None else after - cpu
            return _StreamRun(batches - skipped, now - first, spent, time.process_time() - client)
    raise AssertionError("an endless stream has ended")


class _Client:
    """A client in its own process."""

    def __init__(self) -> None:
        self._remote = RemoteTeacher(_NAME)

    def ready(self) -> None:
        """Return when the first results have arrived."""
        self._remote.extract(BatchShape(rows=1).work.images(), BatchShape().spec)

    def run(self, seconds: float, replicas: int) -> float:
        """Batches/s."""
        return _run(self._remote, BatchShape(), seconds, replicas).rate


def _several(
    plan: ScalingPlan, replicas: int, on_step: Callable[[str], None]
) -> Iterator[tuple[int, list[float], float | None]]:
    """Yield (number of clients, batches/s of each, busy cores) for each number of clients that run at the same time."""
    remote_class = ray.remote(num_cpus=0)(_Client)
    clients: list[Any] = []
    try:
        for number in plan.clients:
            on_step(f"clients {number}")
            clients += [remote_class.remote() for _ in range(number - len(clients))]
            ray.get([client.ready.remote() for client in clients], timeout=300)
            before, begun = cpu_seconds(), time.perf_counter()
            rates = ray.get([client.run.remote(plan.seconds, replicas) for client in clients], timeout=300)
            after, ended = cpu_seconds(), time.perf_counter()
            busy = None if before is None or after is None else (after - before) / (ended - begun)
            yield number, rates, busy
    finally:
        for client in clients:
            ray.kill(client)


def _copy_rate(cores: int) -> float:
    """Bytes/s that all cores together copy in memory."""
    pairs = [[torch.ones(_COPY_BYTES, dtype=torch.uint8) for _ in range(2)] for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        best = float("inf")
        for _ in range(5):
            begun = time.perf_counter()
            list(pool.map(lambda pair: pair[1].copy_(pair[0]), pairs))
            best = min(best, time.perf_counter() - begun)
    return cores * _COPY_BYTES / best


_PROC = Path("/proc")


def cpu_seconds() -> float | None:
    """Core seconds that this process and its living descendants have used since they started.

    If no Ray is among them (it was joined, not started), those of the whole machine since its start.
    None without /proc.
    """
    if not (_PROC / "stat").exists():
        return None
    ticks, children, has_ray = {}, defaultdict(list), set()
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        stat = read_stat(folder)
        if stat is None:
            continue  # it has ended meanwhile
        (name, fields), pid = stat, int(folder.name)
        ticks[pid] = int(fields[USER_TICKS]) + int(fields[SYSTEM_TICKS])
        children[int(fields[PARENT])].append(pid)
        if name == "raylet":
            has_ray.add(pid)
    family, found = [os.getpid()], 0
    while found < len(family):
        family += children[family[found]]
        found += 1
    per_second = os.sysconf("SC_CLK_TCK")
    if has_ray.intersection(family):
        return sum(ticks[pid] for pid in family) / per_second
    # user, nice, system, idle, iowait, irq, softirq
    machine = [int(value) for value in (_PROC / "stat").read_text().splitlines()[0].split()[1:8]]
    return (sum(machine) - machine[3] - machine[4]) / per_second
