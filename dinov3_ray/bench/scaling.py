"""What a pool of simulated accelerators delivers as work grows, compared with what ``bench.cost`` predicts.

The costs are measured with one replica, one client, and batches of two sizes. Everything else is predicted from them,
and then measured. Everything runs on one node; nothing else should run there.
"""

from __future__ import annotations

import functools
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
from dinov3_ray.bench.machine import describe_machine
from dinov3_ray.bench.simulated import Accelerator, Work
from dinov3_ray.features import FeatureSpec
from dinov3_ray.pool.client.remote import RemoteTeacher
from dinov3_ray.pool.teacher_pool import TeacherPool

__all__ = ["QUICK", "Point", "Scaling", "ScalingPlan", "Shape", "cpu_seconds", "measure_scaling"]


_NAME = "bench-scaling"
_WORK = Work()  # 40 ms for 32 images
_COPY_BYTES = 64 * 2**20
_AXES = {"replicas": "{0} replica", "batch": "batch of {0}", "map": "map {0} x {0}", "clients": "{0} client"}
_COUNTED = ("replicas", "clients")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a batch: ``rows`` images, and maps of ``side`` x ``side``."""

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
        """Of the images and the results."""
        return self.rows * 3 * _WORK.pixels**2 + self.work.result_bytes

    def load(self, replicas: int, clients: int = 1, seconds: float = _WORK.seconds) -> Workload:
        return Workload(replicas, clients, self.rows, self.nbytes, seconds * self.rows / _WORK.rows)


@dataclass(frozen=True, slots=True)
class ScalingPlan:
    """What to measure.

    Attributes:
        replicas: numbers of them, in rising order, with the usual batch and one client.
        batches: images a batch, with the base's number of replicas; likewise ``sides`` of maps, and ``clients``.
        base: a number in ``replicas``.
        seconds: that count, of each point.
        calibration: the two shapes from which the costs are taken.
        network: bytes per second of a client on another node; nothing is sent there, it is only calculated with.
    """

    replicas: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    sides: tuple[int, ...] = (7, 14, 28, 40)
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    base: int = 4
    seconds: float = 3.0
    calibration: tuple[Shape, Shape] = (Shape(rows=1), Shape(side=28))
    network: float = 25e9 / 8


QUICK = ScalingPlan((1, 2, 4), (1, 32), (7, 28), (1, 2), base=2, seconds=1.0)


@dataclass(frozen=True, slots=True)
class Point:
    """One measured point, beside its prediction; rates are in batches/s of all clients together.

    Attributes:
        axis: what grows: ``replicas``, ``batch``, ``map`` or ``clients``.
        value: of it.
        cpu: cores that were busy; None where the machine does not tell.
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
        return self.predicted / self.measured


@dataclass(frozen=True, slots=True)
class Scaling:
    """What was measured, and on what."""

    plan: ScalingPlan
    costs: Costs
    points: tuple[Point, ...]
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

    def walls(self) -> tuple[list[Shape], dict[str, list[float]]]:
        """Three shapes, and the number of accelerators that each part keeps busy, one number per shape."""
        shapes = [Shape(side=7), Shape(), Shape(side=28)]
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
        """Each point, and what each part allows by itself."""
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
        table = Table(
            title="What each part allows by itself",
            caption=f"accelerators of 40 ms for 32 images that it feeds, batches of 32; one node of "
            f"{self.costs.cores} cores that copies {self.costs.copy_rate / 2**30:.1f} GiB/s ({COPIES} copies per byte)"
            f", clients on other nodes with {self.plan.network * 8 / 1e9:g} Gbit/s each (calculated)",
        )
        table.add_column("")
        for shape in shapes:
            table.add_column(f"map {shape.side} x {shape.side}, {shape.nbytes / 2**20:.1f} MiB", justify="right")
        for wall, fed in walls.items():
            table.add_row(wall, *(f"{number:.1f}" for number in fed))
        return table


@dataclass(frozen=True, slots=True)
class _Run:
    """Some seconds in the middle of an endless stream."""

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
    points: list[Point] = []

    def note(axis: str, value: int, load: Workload, measured: float, cpu: float | None, slowest: float = 1.0) -> None:
        predicted, wall = costs.predict(load)
        points.append(Point(axis, value, load, measured, predicted, wall, costs.walls(load), cpu, slowest))

    with _pool(_WORK.seconds, plan) as pool:
        remote = pool.teacher()

        def measure(axis: str, value: int, replicas: int, shape: Shape) -> None:
            on_step(f"{axis} {value}")
            run = _run(remote, shape, plan.seconds, replicas)
            cpu = None if run.cpu is None else run.cpu / run.seconds
            note(axis, value, shape.load(replicas), run.rate, cpu)

        for replicas in plan.replicas:
            on_step(f"start of {replicas} replicas")
            pool.scale(replicas, wait=True)
            measure("replicas", replicas, replicas, Shape())
            if replicas != plan.base:
                continue
            for rows in plan.batches:
                measure("batch", rows, replicas, Shape(rows=rows))
            for side in plan.sides:
                measure("map", side, replicas, Shape(side=side))
            for clients, rates, cpu in _several(plan, replicas, on_step):
                slowest = min(rates) / max(rates)
                note("clients", clients, Shape().load(replicas, clients), sum(rates), cpu, slowest)
    return Scaling(plan, costs, tuple(points), describe_machine())


def _pool(seconds: float, plan: ScalingPlan) -> TeacherPool:
    """One replica, whose device takes ``seconds`` for the usual batch."""
    work = replace(_WORK, seconds=seconds)
    most = max(*plan.batches, *(shape.rows for shape in plan.calibration), _WORK.rows)
    factory = functools.partial(Accelerator, work)
    return TeacherPool.start(factory, name=_NAME, replicas=1, num_gpus=0, max_batch=most)


def _calibrate(plan: ScalingPlan) -> Costs:
    """From one replica whose device takes no time."""
    cores = os.cpu_count() or 1
    with _pool(0.0, plan) as pool:
        remote = pool.teacher()
        # From the larger one on: the store's memory is touched for the first time then, which costs more.
        large, small = (
            _spent(shape, _run(remote, shape, plan.seconds, 1), cores) for shape in reversed(plan.calibration)
        )
    return Costs.calibrated(cores, _copy_rate(cores), small, large)


def _spent(shape: Shape, run: _Run, cores: int) -> Spent:
    """Where the machine does not tell what was busy, all cores are taken to have been."""
    cpu = run.seconds * cores if run.cpu is None else run.cpu
    return Spent(shape.nbytes, cpu / run.batches, run.client / run.batches)


def _run(remote: RemoteTeacher, shape: Shape, seconds: float, replicas: int) -> _Run:
    """The middle of a stream: after it has filled, and before it ends, so that neither counts."""
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
            # Each replica has had its turn, and the client knows how fast it is.
            if batches >= 4 * replicas and now - begun >= seconds / 3:
                skipped, first, cpu, client = batches, now, cpu_seconds(), time.process_time()
        elif now - first >= seconds and batches - skipped >= 2 * replicas:
            after = cpu_seconds()
            spent = None if cpu is None or after is None else after - cpu
            return _Run(batches - skipped, now - first, spent, time.process_time() - client)
    raise AssertionError("an endless stream has ended")


class _Client:
    """A client in a process of its own."""

    def __init__(self) -> None:
        self._remote = RemoteTeacher(_NAME)

    def ready(self) -> None:
        """Answer, and have the first results."""
        self._remote.extract(Shape(rows=1).work.images(), Shape().spec)

    def run(self, seconds: float, replicas: int) -> float:
        """Batches/s."""
        return _run(self._remote, Shape(), seconds, replicas).rate


def _several(
    plan: ScalingPlan, replicas: int, on_step: Callable[[str], None]
) -> Iterator[tuple[int, list[float], float | None]]:
    """(clients, each one's batches/s, cores that were busy), all at once each time."""
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
    """Bytes/s that all cores together copy from memory to memory."""
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
    """Core seconds of this process and its descendants that are alive, since they began.

    Where no Ray is among them (it was joined, not started), those of the whole machine since it started; None where the
    system does not tell.
    """
    if not (_PROC / "stat").exists():
        return None
    ticks, children, has_ray = {}, defaultdict(list), set()
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # pid (name) state parent ...: the name may hold anything
            before, _, after = (folder / "stat").read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        fields, pid = after.split(), int(folder.name)
        ticks[pid] = int(fields[11]) + int(fields[12])
        children[int(fields[1])].append(pid)
        if before.endswith("(raylet"):
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
