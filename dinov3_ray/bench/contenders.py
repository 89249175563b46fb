"""The pool and its peers, each doing the same work: the nearest things that Ray itself offers.

Every contender is given the batches one by one, delivers the maps as torch tensors to the driver, and reports the
seconds from the first submission to the last result. All keep two batches a replica in flight where they can.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import ray
import torch
from ray.util import ActorPool

from dinov3_ray.bench.simulated import SPEC, Accelerator, Work
from dinov3_ray.pool.teacher_pool import TeacherPool

__all__ = ["CONTENDERS", "Contender", "missing_reason"]

Contender = Callable[[Work, int], list[float]]
"""Does the work so many times after one warm-up; returns the seconds of each."""


def this_pool(work: Work, repeats: int) -> list[float]:
    """TeacherPool with prefetch, as a training loop uses it."""
    images = work.images()
    with TeacherPool.start(
        functools.partial(Accelerator, work), name="bench", replicas=work.replicas, num_gpus=0, max_batch=work.rows
    ) as pool:
        remote = pool.teacher()

        def once() -> int:
            stream = remote.prefetch(range(work.batches), SPEC, images=lambda _: images)
            return sum(len(features) for _, features in stream)

        return _timed(once, work, repeats)


class _Worker:
    """A plain actor around the accelerator. ``as_numpy`` hands the map out as an int16 view, which crosses uncopied."""

    def __init__(self, work: Work, as_numpy: bool) -> None:
        self._teacher = Accelerator(work)
        self._as_numpy = as_numpy

    def infer(self, images: Any) -> Any:
        map_BDhw = self._teacher.extract(torch.as_tensor(np.array(images)), SPEC).feature_map
        assert map_BDhw is not None
        return map_BDhw.view(torch.int16).numpy() if self._as_numpy else map_BDhw


def actor_pool(work: Work, repeats: int, *, as_numpy: bool) -> list[float]:
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
    from ray import serve  # its dependencies are an extra of Ray's

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


#: Names as the table shows them. The first is this project.
CONTENDERS: dict[str, Contender] = {
    "TeacherPool + prefetch": this_pool,
    "ActorPool, torch tensors": functools.partial(actor_pool, as_numpy=False),
    "ActorPool, NumPy": functools.partial(actor_pool, as_numpy=True),
    "Serve handle, NumPy": serve_handle,
    "Ray Data map_batches": ray_data,
}


def missing_reason(name: str) -> str | None:
    """Why a contender cannot run here; None if it can."""
    if name.startswith("Serve") and not (find_spec("fastapi") and find_spec("uvicorn")):
        return "Ray Serve is not installed"
    return None


def _as_tensor(result: Any) -> torch.Tensor:
    """Arrays are copied out of the store, since torch would share read-only memory as writable."""
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
    """Without Ray Data's own progress bars."""
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        yield
    finally:
        context.enable_progress_bars = before
