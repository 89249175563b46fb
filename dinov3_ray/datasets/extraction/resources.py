"""Who computes where: a pure decision from what the cluster has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dinov3_ray.errors import ConfigError

__all__ = ["Placement", "place"]


_POOL_PASSES = 4  # calls that wait for a pool
_CPU_PASSES = 4
_ACTOR_CPUS = 0.1


@dataclass(frozen=True, slots=True)
class Placement:
    """Of the teacher's actors and the decoding tasks.

    Attributes:
        replicas: actors.
        num_gpus, num_cpus: that each reserves.
        decode_cpus: that a decoding task reserves.
        window: decoding tasks that each call of an actor keeps going.
        passes: through the teacher that an actor makes at a time.
        threads: torch's, for each of these passes, in an actor that computes on CPUs; None leaves them to torch.
    """

    replicas: int
    num_gpus: float
    num_cpus: float
    decode_cpus: float
    window: int
    passes: int
    threads: int | None


def place(
    resources: Mapping[str, float],
    nodes: int,
    *,
    replicas: int | None = None,
    num_gpus: float | None = None,
    decoders: int | None = None,
    threads: int | None = None,
    pooled: bool = False,
    reentrant: bool = False,
    free_cpus: float | None = None,
) -> Placement:
    """One actor a GPU where the cluster has any, else one a node; for a pool, one actor that asks it.

    On CPUs a ``reentrant`` teacher makes several passes at a time, on fewer threads each: threads that share a pass
    wait for one another, the more so when decoding or writing holds up one of them.

    Actors reserve little, whatever they use: should nodes die and their actors crowd on those that are left, decoding
    must still find a CPU there, or nothing would ever go on. For the same reason a task reserves no more than others (a
    pool's replicas, say) leave of ``free_cpus``, and nothing if that is nothing.

    Raises:
        ConfigError: an option is out of range, or the cluster has not got that much.
    """
    for name, value in (("replicas", replicas), ("decoders", decoders), ("threads", threads)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be an integer, at least 1; got {value!r}")
    gpus, cpus = resources.get("GPU", 0.0), max(resources.get("CPU", 1.0), 1.0)
    if pooled:
        num_gpus = 0.0
    elif num_gpus is None:
        num_gpus = 1.0 if gpus >= 1 else 0.0
    if num_gpus < 0 or (replicas or 1) * num_gpus > gpus:
        raise ConfigError(
            f"replicas x num_gpus must fit the cluster's {gpus:g} GPUs; got {replicas or 1} x {num_gpus:g}"
        )
    if replicas is None:
        replicas = 1 if pooled else int(gpus // num_gpus) if num_gpus else nodes
    num_cpus = 0.0 if pooled else min(_ACTOR_CPUS, cpus / 2 / replicas)
    spare = ((cpus if free_cpus is None else free_cpus) - replicas * num_cpus) / nodes
    wanted = 1.0 if cpus / nodes >= 2 else 0.5
    decode_cpus = wanted if spare >= wanted else max(0.0, math.floor(spare * 10) / 10)
    if threads is None and not num_gpus and not pooled:
        threads = max(1, int(cpus / nodes) // math.ceil(replicas / nodes))
    passes = _POOL_PASSES if pooled else 1
    if threads is not None and reentrant and not num_gpus and not pooled:
        passes = min(threads, _CPU_PASSES)
        threads //= passes
    return Placement(
        replicas,
        num_gpus,
        num_cpus,
        decode_cpus,
        decoders or max(2, math.ceil(cpus / replicas)),
        passes,
        threads,
    )
