"""How fast one result reaches the client, with an accelerator that takes no time."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import torch

from dinov3_ray.bench.simulated import SPEC, Accelerator, Work
from dinov3_ray.pool.teacher_pool import TeacherPool

__all__ = ["Transport", "measure_transport"]


@dataclass(frozen=True, slots=True)
class Transport:
    """Seconds a result, one after the other, medians of ``repeats``.

    Attributes:
        pool: through ``RemoteTeacher.extract``, images and all.
        torch_actor: a plain actor that returns the torch tensor, fetched with ``ray.get``.
        copy: the bound: the result copied once within this process's memory.
    """

    result_bytes: int
    repeats: int
    pool: float
    torch_actor: float
    copy: float

    @property
    def ratio(self) -> float:
        """How many times the plain actor's rate the pool reaches."""
        return self.torch_actor / self.pool


class _TorchActor:
    def __init__(self, work: Work) -> None:
        self._teacher = Accelerator(work)

    def infer(self, images: torch.Tensor) -> torch.Tensor:
        map_BDhw = self._teacher.extract(images, SPEC).feature_map
        assert map_BDhw is not None
        return map_BDhw


def measure_transport(work: Work, repeats: int) -> Transport:
    """Measure in the Ray that this process is connected to; images of 32 px, so that results are what counts."""
    images = work.images()
    actor: Any = ray.remote(num_cpus=0)(_TorchActor).remote(work)
    with TeacherPool.start(
        functools.partial(Accelerator, work), name="bench-transport", replicas=1, num_gpus=0, max_batch=work.rows
    ) as pool:
        remote = pool.teacher()
        through_pool = _median(lambda: remote.extract(images, SPEC), repeats)
        plain = _median(lambda: ray.get(actor.infer.remote(images)), repeats)
    ray.kill(actor)
    memory = torch.ones(work.result_bytes, dtype=torch.uint8)
    return Transport(work.result_bytes, repeats, through_pool, plain, _median(memory.clone, repeats))


def _median(once: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 3):
        begun = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[3:])
