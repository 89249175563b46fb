"""The throughput of a pool and of its peers on simulated accelerators, as a share of the accelerators' own rate.

The peers are the nearest tools of Ray itself. Each contender gets the batches one by one, delivers the maps to the
driver as torch tensors, and reports the seconds from the first submission to the last result. All of them that can keep
two batches per replica in flight.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import ray
import torch
from ray.util import ActorPool
from rich.table import Table

from dinov3_ray.bench.printout import describe_machine, new_table
from dinov3_ray.bench.simulated import SPEC, Accelerator, Work, simulated_pool
from dinov3_ray.features import FeatureSpec
from dinov3_ray.pool.client.remote import RemoteTeacher

__all__ = [
    "CONTENDERS",
    "Contender",
    "ContenderRow",
    "Throughput",
    "measure_throughput",
    "missing_reason",
    "prefetch_all",
]


@dataclass(frozen=True, slots=True)
class ContenderRow:
    """The seconds of one contender, one value per run; or ``missing``, the reason why there are none."""

    name: str
    seconds: tuple[float, ...] = ()
    missing: str | None = None

    def images_per_second(self, work: Work) -> float:
        """The median rate of the runs."""
        return work.batches * work.rows / statistics.median(self.seconds)

    def share_of_ideal(self, work: Work) -> float:
        """The median rate of the runs over that of accelerators that never wait."""
        return work.ideal_seconds / statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Throughput:
    """The results of all contenders."""

    work: Work
    rows: tuple[ContenderRow, ...]
    machine: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "work": asdict(self.work),
            "machine": self.machine,
            "contenders": [
                asdict(row)
                | (
                    {}
                    if row.missing
                    else {
                        "images_per_second": row.images_per_second(self.work),
                        "share_of_ideal": row.share_of_ideal(self.work),
                    }
                )
                for row in self.rows
            ],
        }

    def tables(self) -> list[Table]:
        """One row per contender."""
        work = self.work
        ideal = work.batches * work.rows / work.ideal_seconds
        table = new_table(
            f"{work.replicas} simulated accelerators, {work.seconds * 1e3:g} ms for {work.rows} images, "
            f"bfloat16 maps [{work.rows}, {work.channels}, {work.side}, {work.side}]",
            f"ideal {ideal:.0f} img/s; median of {len(self.rows[0].seconds)} runs of {work.batches} batches, "
            f"after one to warm up\n{self.machine}",
            *("", "img/s", "of the ideal", "slowest .. fastest run"),
        )
        for row in self.rows:
            if row.missing:
                table.add_row(row.name, "-", "-", row.missing)
                continue
            shares = [work.ideal_seconds / seconds for seconds in row.seconds]
            spread = f"{min(shares):.0%} .. {max(shares):.0%}"
            rate, share = row.images_per_second(work), row.share_of_ideal(work)
            table.add_row(row.name, f"{rate:.0f}", f"{share:.0%}", spread)
        return [table]


def measure_throughput(work: Work, repeats: int, on_contender: Callable[[str], None]) -> Throughput:
    """Let each contender do ``work`` in the Ray that this process is connected to, one after the other."""
    rows = []
    with quiet_data():
        for name, contender in CONTENDERS.items():
            on_contender(name)
            missing = missing_reason(name)
            rows.append(
                ContenderRow(name, missing=missing) if missing else ContenderRow(name, tuple(contender(work, repeats)))
            )
    return Throughput(work, tuple(rows), describe_machine())


Contender = Callable[[Work, int], list[float]]
"""Does the work once to warm up, then the given number of times; returns the seconds of each of these."""


def this_pool(work: Work, repeats: int) -> list[float]:
    """TeacherPool with prefetch, as a training loop uses it."""
    images = work.images()
    with simulated_pool(work, "bench") as pool:
        remote = pool.teacher()
        return _timed(lambda: prefetch_all(remote, images, work.batches, SPEC), work, repeats)


def prefetch_all(remote: RemoteTeacher, images: torch.Tensor, batches: int, spec: FeatureSpec) -> int:
    """Send ``images`` that many times, as a training loop does; returns the number of images that had features."""
    stream = remote.prefetch(range(batches), spec, images=lambda _: images)
    return sum(len(features) for _, features in stream)


class _Worker:
    """A plain actor with an accelerator. ``as_numpy`` returns an int16 view of the map, which Ray does not copy."""

    def __init__(self, work: Work, as_numpy: bool) -> None:
        self._teacher = Accelerator(work)
        self._as_numpy = as_numpy

    def infer(self, images: Any) -> Any:
        map_BDhw = self._teacher.extract(torch.as_tensor(np.array(images)), SPEC).feature_map
        assert map_BDhw is not None
        return map_BDhw.view(torch.int16).numpy() if self._as_numpy else map_BDhw


def ray_actor_pool(work: Work, repeats: int, *, as_numpy: bool) -> list[float]:
    """ray.util.ActorPool over plain actors."""
    workers = [ray.remote(num_cpus=0)(_Worker).remote(work, as_numpy) for _ in range(work.replicas)]
    images = work.images().numpy() if as_numpy else work.images()
    try:
        pool = ActorPool(workers)

        def once() -> int:
            results = pool.map(lambda worker, batch: worker.infer.remote(batch), (images for _ in range(work.batches)))
            return sum(len(_as_tensor(result)) for result in results)

        return _timed(once, work, repeats)
    finally:
        for worker in workers:
            ray.kill(worker)


def serve_handle(work: Work, repeats: int) -> list[float]:
    """A Ray Serve deployment called through its handle, with NumPy results."""
    from ray import serve  # here, since it is an extra of Ray

    deployment = serve.deployment(
        num_replicas=work.replicas, max_ongoing_requests=2, ray_actor_options={"num_cpus": 0}
    )(_Worker)
    handle = serve.run(deployment.bind(work, True), name="bench", route_prefix=None)
    images = work.images().numpy()
    try:

        def once() -> int:
            responses = [handle.infer.remote(images) for _ in range(work.batches)]
            return sum(len(_as_tensor(response.result())) for response in responses)

        return _timed(once, work, repeats)
    finally:
        serve.shutdown()


class _MapBatches:
    """The accelerator as a Ray Data user-defined function."""

    def __init__(self, work: Work) -> None:
        self._worker = _Worker(work, as_numpy=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"map": self._worker.infer(batch["image"])}


def ray_data(work: Work, repeats: int) -> list[float]:
    """Ray Data's map_batches over an actor pool, its results iterated in the driver."""
    images = work.images().numpy()

    def once() -> int:
        data = ray.data.range(work.batches * work.rows, override_num_blocks=work.batches)
        data = data.map_batches(lambda _: {"image": images}, batch_size=work.rows)
        data = data.map_batches(
            _MapBatches,
            fn_constructor_args=(work,),
            batch_size=work.rows,
            compute=ray.data.ActorPoolStrategy(size=work.replicas),
            num_cpus=0,
        )
        return sum(len(_as_tensor(batch["map"])) for batch in data.iter_batches(batch_size=work.rows))

    return _timed(once, work, repeats)


#: By the names that the table shows. The first is this project.
CONTENDERS: dict[str, Contender] = {
    "TeacherPool + prefetch": this_pool,
    "ActorPool, torch tensors": functools.partial(ray_actor_pool, as_numpy=False),
    "ActorPool, NumPy": functools.partial(ray_actor_pool, as_numpy=True),
    "Serve handle, NumPy": serve_handle,
    "Ray Data map_batches": ray_data,
}


def missing_reason(name: str) -> str | None:
    """The reason why a contender cannot run here; None if it can."""
    if CONTENDERS[name] is serve_handle and not (find_spec("fastapi") and find_spec("uvicorn")):
        return "Ray Serve is not installed"
    return None


def _as_tensor(result: Any) -> torch.Tensor:
    """The result as a tensor. Arrays are copied, since torch would share the store's read-only memory as writable."""
    return result if isinstance(result, torch.Tensor) else torch.from_numpy(np.array(result)).view(torch.bfloat16)


def _timed(once: Callable[[], int], work: Work, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        images = once()
        seconds.append(time.perf_counter() - begun)
        assert images == work.batches * work.rows, images
    return seconds[1:]  # the first warms up


@contextmanager
def quiet_data() -> Iterator[None]:
    """Turn off Ray Data's own progress bars."""
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        yield
    finally:
        context.enable_progress_bars = before
