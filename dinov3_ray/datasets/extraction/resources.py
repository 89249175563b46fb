"""What a run takes of the cluster: what the caller asks for, and the allocation that follows from it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dinov3_ray.errors import ConfigError
from dinov3_ray.pool.spec import GPU_RULE

__all__ = ["Allocation", "Resources", "allocate"]


_POOL_PASSES = 4  # calls that wait for a pool
_CPU_PASSES = 4
_ACTOR_CPUS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What an extraction may take of the cluster; None leaves the choice to it.

    It checks itself: a pydantic model that callers construct would raise pydantic's errors, not this package's.

    Args:
        replicas: actors with a teacher; by default one per GPU, or one per node if the cluster has no GPU.
        num_gpus: GPUs that each of them reserves, and of whose memory it takes no more; by default 1 if the cluster has
            any.
        decoders: decoding tasks in flight for each block; by default as many as an actor's share of the CPUs.
        threads: CPU threads of a teacher that computes on the CPU; by default its share of the node's.

    Raises:
        ConfigError: names the option, the rule and the value.
    """

    replicas: int | None = None
    num_gpus: float | None = None
    decoders: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("replicas", "decoders", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be an integer, at least 1; got {value!r}")
        gpus = self.num_gpus
        number = isinstance(gpus, (int, float)) and not isinstance(gpus, bool)
        if gpus is not None and not (number and 0 <= gpus <= 1):
            raise ConfigError(f"num_gpus {GPU_RULE}; got {gpus!r}")


@dataclass(frozen=True, slots=True)
class Allocation:
    """What the teacher's actors and the decoding tasks get.

    Attributes:
        replicas: actors.
        num_gpus, num_cpus: that each reserves.
        decode_cpus: that a decoding task reserves.
        window: decoding tasks that each call of an actor keeps in flight.
        passes: through the teacher that an actor makes at a time.
        threads: CPU threads that each of these passes computes with; None leaves torch's setting alone.
    """

    replicas: int
    num_gpus: float
    num_cpus: float
    decode_cpus: float
    window: int
    passes: int
    threads: int | None


def allocate(
    cluster: Mapping[str, float],
    nodes: int,
    wanted: Resources = Resources(),
    *,
    pooled: bool = False,
    reentrant: bool = False,
    free_cpus: float | None = None,
) -> Allocation:
    """One actor per GPU where the ``cluster`` has any, else one per node; for a pool, one actor that is its client.

    On CPUs a ``reentrant`` teacher makes several passes at a time, on fewer threads each: threads that share a pass
    wait for one another, the more so when decoding or writing holds up one of them.

    Actors reserve little, whatever they use: should nodes die and their actors crowd on those that are left, decoding
    must still find a CPU there, or the run would stop for good. For the same reason a task reserves at most what others
    (a pool's replicas, say) leave of ``free_cpus``, and nothing if nothing is left.

    Raises:
        ConfigError: the cluster has fewer GPUs than that.
    """
    replicas, num_gpus, threads = wanted.replicas, wanted.num_gpus, wanted.threads
    gpus, cpus = cluster.get("GPU", 0.0), max(cluster.get("CPU", 1.0), 1.0)
    if pooled:
        num_gpus = 0.0
    elif num_gpus is None:
        num_gpus = 1.0 if gpus >= 1 else 0.0
    if (replicas or 1) * num_gpus > gpus:
        raise ConfigError(
            f"replicas x num_gpus must fit the cluster's {gpus:g} GPUs; got {replicas or 1} x {num_gpus:g}"
        )
    if replicas is None:
        replicas = 1 if pooled else int(gpus // num_gpus) if num_gpus else nodes
    num_cpus = 0.0 if pooled else min(_ACTOR_CPUS, cpus / 2 / replicas)
    spare = ((cpus if free_cpus is None else free_cpus) - replicas * num_cpus) / nodes
    usual = 1.0 if cpus / nodes >= 2 else 0.5
    decode_cpus = usual if spare >= usual else max(0.0, math.floor(spare * 10) / 10)
    if threads is None and not num_gpus and not pooled:
        threads = max(1, int(cpus / nodes) // math.ceil(replicas / nodes))
    passes = _POOL_PASSES if pooled else 1
    if threads is not None and reentrant and not num_gpus and not pooled:
        passes = min(threads, _CPU_PASSES)
        threads //= passes
    return Allocation(
        replicas,
        num_gpus,
        num_cpus,
        decode_cpus,
        wanted.decoders or max(2, math.ceil(cpus / replicas)),
        passes,
        threads,
    )
