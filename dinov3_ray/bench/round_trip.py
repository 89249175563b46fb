"""The time in which one result reaches the client, a large one and a small one, if its accelerator takes no time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
import torch
from rich.table import Table

from dinov3_ray.bench import describe_machine, new_table
from dinov3_ray.bench.simulated import SPEC, Accelerator, Work, simulated_pool
from dinov3_ray.features import FeatureSpec

__all__ = ["RoundTrips", "measure_round_trips"]


_CLS = FeatureSpec(cls=True)
_WARM_UP = 40  # results; Ray frees them in groups, so that fewer would not touch each page of the store that is used


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Seconds per result, one at a time; medians of ``repeats``, or of eight times as many for small results.

    Attributes:
        result_bytes: of one map.
        repeats: results that count.
        pool: a map through ``RemoteTeacher.extract``, with its images.
        torch_actor: a plain actor that returns the map as a torch tensor, fetched with ``ray.get``.
        copy: the bound of the map: one copy in this process's memory.
        token: the CLS token of one image through ``RemoteTeacher.extract``.
        nothing: the bound of the token: an async actor's method that does nothing, fetched with ``ray.get``.
    """

    result_bytes: int
    repeats: int
    pool: float
    torch_actor: float
    copy: float
    token: float
    nothing: float

    @property
    def ratio(self) -> float:
        """The pool's rate over the plain actor's."""
        return self.torch_actor / self.pool

    @property
    def token_ratio(self) -> float:
        """The time of a token over that of a bare call."""
        return self.token / self.nothing

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "ratio": self.ratio,
            "token_ratio": self.token_ratio,
            "machine": describe_machine(),
        }

    def tables(self) -> list[Table | str]:
        """Milliseconds and rates as a table, and both ratios in one line."""
        title = f"One result of {self.result_bytes / 2**20:.1f} MiB, and one token"
        table = new_table(title, f"medians\n{describe_machine()}", "", "ms", "results/s")
        rows = {
            "map, RemoteTeacher.extract": self.pool,
            "map, plain actor that returns the torch tensor": self.torch_actor,
            "bound: the map copied once in memory": self.copy,
            "CLS token of one image, RemoteTeacher.extract": self.token,
            "bound: a bare async actor's call": self.nothing,
        }
        for name, seconds in rows.items():
            table.add_row(name, f"{seconds * 1e3:.2f}", f"{1 / seconds:.0f}")
        ratios = f"map: {self.ratio:.1f} times the plain actor's rate; token: {self.token_ratio:.1f} times a bare call"
        return [table, ratios]


class _AsyncActor:
    async def nothing(self) -> None:
        """Do nothing."""


class _TorchActor:
    def __init__(self, work: Work) -> None:
        self._teacher = Accelerator(work)

    def infer(self, images: torch.Tensor) -> torch.Tensor:
        map_BDhw = self._teacher.extract(images, SPEC).feature_map
        assert map_BDhw is not None
        return map_BDhw


def measure_round_trips(work: Work, repeats: int) -> RoundTrips:
    """Measure in the Ray that this process is connected to, ``repeats`` maps and eight times as many tokens."""
    images = work.images()
    torch_actor: Any = ray.remote(num_cpus=0)(_TorchActor).remote(work)
    async_actor: Any = ray.remote(num_cpus=0)(_AsyncActor).remote()
    with simulated_pool(replace(work, replicas=1), "bench-transport") as pool:
        remote = pool.teacher()
        through_pool = _median(lambda: remote.extract(images, SPEC), repeats)
        plain = _median(lambda: ray.get(torch_actor.infer.remote(images)), repeats)
        token = _median(lambda: remote.extract(images[:1], _CLS), 8 * repeats)
        nothing = _median(lambda: ray.get(async_actor.nothing.remote()), 8 * repeats)
    for actor in (torch_actor, async_actor):
        ray.kill(actor)
    memory = torch.ones(work.result_bytes, dtype=torch.uint8)
    copy = _median(memory.clone, repeats)
    return RoundTrips(work.result_bytes, repeats, through_pool, plain, copy, token, nothing)


def _median(once: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + _WARM_UP):
        begun = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[_WARM_UP:])
