"""How many replicas the load calls for. Pure: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Sequence

from dinov3_ray.pool.messages import ReplicaStatistics
from dinov3_ray.pool.spec import PoolOptions

__all__ = ["Autoscaler"]


class Autoscaler:
    """Grows a pool by one when requests wait too long, and shrinks it by one when it has been idle for long.

    The wait is that of a request that arrives now: all images that wait, at replicas and at clients, divided by the
    measured speed of the pool. While replicas are missing or starting, the pool does not grow further, so that one
    burst does not start more than it needs. It does not shrink while no replica is ready to report whether there is
    work.
    """

    def __init__(self, *, busy_seconds: float, idle_seconds: float) -> None:
        self._busy_seconds = busy_seconds
        self._idle_seconds = idle_seconds
        self._images = 0
        self._idle_since: float | None = None

    @classmethod
    def of(cls, options: PoolOptions) -> Autoscaler:
        """As a pool's options say."""
        return cls(busy_seconds=options.busy_seconds, idle_seconds=options.idle_seconds)

    def target(self, current: int, ready: Sequence[ReplicaStatistics], starting: int, now: float) -> int:
        """The number of replicas wanted, by the ``current`` target and the statistics of the ready replicas."""
        images = sum(one.images for one in ready)
        idle = images == self._images and not any(one.waiting or one.busy_for or one.clients_backlog for one in ready)
        self._images = images
        if not idle or not ready:
            self._idle_since = None
            grow = not starting and len(ready) >= current and expected_wait(ready) > self._busy_seconds
            return current + 1 if grow else current
        if self._idle_since is None:
            self._idle_since = now
        if now - self._idle_since >= self._idle_seconds:
            self._idle_since = now
            return current - 1
        return current


def expected_wait(ready: Sequence[ReplicaStatistics]) -> float:
    """Seconds of work that wait per replica, on average; at least the wait of the oldest request."""
    if not ready:
        return 0.0
    images = sum(one.images for one in ready)
    seconds = sum(one.busy_seconds for one in ready)
    # Each client reports its whole backlog to every replica that it sends to: it counts once.
    rows = sum(one.waiting_rows for one in ready) + max(one.clients_backlog for one in ready)
    by_work = rows * seconds / images / len(ready) if images else 0.0
    return max(by_work, max(one.oldest_wait for one in ready))
