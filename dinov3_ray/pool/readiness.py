"""Waiting until a pool is what was asked for, and telling why it does not become so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import ray

from dinov3_ray.errors import PoolError, PoolTimeoutError, ReplicaError
from dinov3_ray.pool.status import PoolStatus

__all__ = ["wait_ready"]

_POLL = 0.02
_HOPELESS_STARTS = 2  # failed starts, none having succeeded, after which a new pool is given up


class _Observable(Protocol):
    def status(self) -> PoolStatus: ...


def wait_ready(
    pool: _Observable,
    name: str,
    timeout: float,
    *,
    generation: int | None = None,
    on_status: Callable[[PoolStatus], None] | None = None,
) -> PoolStatus:
    """Wait until ``pool`` has its minimum of replicas ready, all of one teacher, none to spare.

    Args:
        name: the pool's, for the errors.
        generation: the teacher's number, where it matters which one it is.
        on_status: told of each look at the pool.

    Raises:
        ReplicaError, PoolError, PoolTimeoutError: as :meth:`~dinov3_ray.pool.teacher_pool.TeacherPool.wait_ready` says.
    """
    deadline = time.monotonic() + timeout
    restarts: int | None = None
    while True:
        status = pool.status()
        if on_status is not None:
            on_status(status)
        if generation is not None and status.generation != generation:
            raise _turned(name, generation, status)
        current = [replica for replica in status.replicas if replica.generation == status.generation]
        ready = sum(replica.state == "ready" for replica in current)
        if ready >= status.low and len(status.replicas) <= status.high and len(current) == len(status.replicas):
            return status
        restarts = status.restarts if restarts is None else restarts
        if status.restarts >= restarts + _HOPELESS_STARTS and not ready and not status.reloading:
            raise ReplicaError(f"the replicas of pool {name!r} do not start. {status.troubles[-1]}")
        if time.monotonic() > deadline:
            raise PoolTimeoutError(
                f"pool {name!r} had {ready} of {status.low} replicas ready after timeout={timeout:g} s: "
                f"{_waits_for(status)}"
            )
        time.sleep(_POLL)


def _turned(name: str, generation: int, status: PoolStatus) -> PoolError:
    """Why the pool is not about to become ``generation`` any more."""
    if status.newest_generation > generation:
        return PoolError(f"pool {name!r}: another reload has overtaken this one")
    return ReplicaError(
        f"the new replicas of pool {name!r} do not start, so it has gone back to the former teacher "
        f"({status.ready} of {status.target} ready). {status.troubles[-1]}"
    )


def _waits_for(status: PoolStatus) -> str:
    if status.troubles:
        return f"last trouble: {status.troubles[-1]}"
    if any(replica.pid is None for replica in status.replicas):
        have = ray.cluster_resources() if ray.is_initialized() else {}
        counts = ", ".join(f"{have.get(key, 0):g} {key}" for key in ("GPU", "CPU"))
        return f"some wait for a place in the cluster (it has {counts} in all)"
    return "they are loading their teacher"
