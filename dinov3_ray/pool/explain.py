"""What a client says of a batch that cannot be answered, and a controller of a replica that was lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from dinov3_ray.errors import PoisonBatchError, PoolError, ReplicaError
from dinov3_ray.pool.messages import PoolView
from dinov3_ray.pool.routing import Verdict

if TYPE_CHECKING:  # it loads torch, which the controller has no use for
    from dinov3_ray.pool.handle import Part

__all__ = ["failure_of", "reason_of", "where_is", "why_empty"]


def why_empty(pool: str, timeout: float, view: PoolView | None) -> str:
    """Why nothing could be sent for ``timeout`` seconds."""
    if view is None:
        return f"the controller of pool {pool!r} did not answer within timeout={timeout:g} s"
    troubles = f"; last troubles: {'; '.join(view.troubles[-3:])}" if view.troubles else ""
    return (
        f"pool {pool!r} had no replica ready for timeout={timeout:g} s (0 of {view.target} wanted){troubles}. "
        f"See `dinov3-ray status --name {pool}`"
    )


def where_is(part: Part, pool: str) -> str:
    """The batch and the rows of a part."""
    return f"batch {part.handle.index} (rows {part.start} to {part.stop - 1}) of pool {pool!r}"


def failure_of(part: Part, pool: str, verdict: Verdict) -> PoolError:
    """The error for a request that ended its replicas, or met too many that ended."""
    if verdict is Verdict.POISON:
        return PoisonBatchError(f"{where_is(part, pool)}: replica after replica died while computing it")
    return ReplicaError(f"{where_is(part, pool)}: given up, too many replicas died or fell silent with it")


def reason_of(error: BaseException) -> str:
    """The part of an error that tells a person why a replica was lost, in one line."""
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "its process died"
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or ["no message"]
    return f"{type(cause).__name__}: {lines[-1]}"
