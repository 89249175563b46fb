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

from dinov3_ray.bench.printout import describe_machine, new_table
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
        numpy_actor: a plain actor that returns the map as a NumPy array, fetched with ``ray.get``. It looks at nothing:
            neither whether the images are in order nor whether the results are finite.
        torch_actor: the same with a torch tensor.
        copy: the bound of the map: one copy in this process's memory.
        token: the CLS token of one image through ``RemoteTeacher.extract``.
        nothing: the bound of the token: an async actor's method that does nothing, fetched with ``ray.get``.
    """

    result_bytes: int
    repeats: int
    pool: float
    numpy_actor: float
    torch_actor: float
    copy: float
    token: float
    nothing: float

    @property
    def ratio(self) -> float:
        """The pool's rate over that of the plain actor with torch tensors."""
        return self.torch_actor / self.pool

    @property
    def numpy_ratio(self) -> float:
        """The pool's time over that of the plain actor with NumPy arrays."""
        return self.pool / self.numpy_actor

    @property
    def token_ratio(self) -> float:
        """The time of a token over that of a bare call."""
        return self.token / self.nothing

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "ratio": self.ratio,
            "numpy_ratio": self.numpy_ratio,
            "token_ratio": self.token_ratio,
            "machine": describe_machine(),
        }

    def tables(self) -> list[Table | str]:
        """Milliseconds and rates as a table, and both ratios in one line."""
        title = f"One result of {self.result_bytes / 2**20:.1f} MiB, and one token"
        table = new_table(title, f"medians\n{describe_machine()}", "", "ms", "results/s")
        rows = {
            "map, RemoteTeacher.extract": self.pool,
            "map, plain actor that returns a NumPy array": self.numpy_actor,
            "map, plain actor that returns the torch tensor": self.torch_actor,
            "bound: the map copied once in memory": self.copy,
            "CLS token of one image, RemoteTeacher.extract": self.token,
            "bound: a bare async actor's call": self.nothing,
        }
        for name, seconds in rows.items():
            table.add_row(name, f"{seconds * 1e3:.2f}", f"{1 / seconds:.0f}")
        ratios = (
            f"map: {self.ratio:.1f} times the rate of the plain actor with torch, {self.numpy_ratio:.2f} times the "
            f"time of the one with NumPy; token: {self.token_ratio:.1f} times a bare call"
        )
        return [table, ratios]


class _AsyncActor:
    async def nothing(self) -> None:
        """Do nothing."""


class _TorchActor:
    def __init__(self, work: Work) -> None:
        self._teacher = Accelerator(work)

    def infer(self, images: Any) -> Any:
        map_BDhw = self._teacher.extract(images, SPEC).feature_map
        assert map_BDhw is not None
        return map_BDhw


class _NumpyActor(_TorchActor):
    def infer(self, images: Any) -> Any:
        return super().infer(images).view(torch.int16).numpy()


def measure_round_trips(work: Work, repeats: int) -> RoundTrips:
    """Measure in the Ray that this process is connected to, ``repeats`` maps and eight times as many tokens."""
    images = work.images()
    arrays = images.numpy()
    torch_actor, numpy_actor, async_actor = (
        ray.remote(num_cpus=0)(kind).remote(*given)
        for kind, given in ((_TorchActor, [work]), (_NumpyActor, [work]), (_AsyncActor, []))
    )
    with simulated_pool(replace(work, replicas=1), "bench-transport") as pool:
        remote = pool.teacher()
        through_pool, as_numpy, as_torch = _medians(
            repeats,
            lambda: remote.extract(images, SPEC),
            lambda: ray.get(numpy_actor.infer.remote(arrays)),
            lambda: ray.get(torch_actor.infer.remote(images)),
        )
        token, nothing = _medians(
            8 * repeats, lambda: remote.extract(images[:1], _CLS), lambda: ray.get(async_actor.nothing.remote())
        )
    for actor in (torch_actor, numpy_actor, async_actor):
        ray.kill(actor)
    memory = torch.ones(work.result_bytes, dtype=torch.uint8)
    (copy,) = _medians(repeats, memory.clone)
    return RoundTrips(work.result_bytes, repeats, through_pool, as_numpy, as_torch, copy, token, nothing)


def _medians(repeats: int, *contenders: Callable[[], object]) -> list[float]:
    """The median seconds of each contender; they take turns, so that a slow moment of the machine meets all of them."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats + _WARM_UP):
        for once, taken in zip(contenders, seconds, strict=True):
            begun = time.perf_counter()
            once()
            taken.append(time.perf_counter() - begun)
    return [statistics.median(taken[_WARM_UP:]) for taken in seconds]
