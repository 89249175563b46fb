"""A snapshot of a pool, for people and for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dinov3_ray.pool.replica_statistics import ReplicaStatistics

__all__ = ["PoolStatus", "ReplicaStatus"]


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica: its state (``starting``, ``ready`` or ``draining``), where it runs, and its counters."""

    replica_id: str
    state: str
    generation: int
    seconds_in_state: float
    node_id: str | None = None
    pid: int | None = None
    fingerprint: str | None = None
    device: str | None = None
    golden_cosine: float | None = None
    statistics: ReplicaStatistics | None = None

    @property
    def images_per_second(self) -> float | None:
        """While it computes; None before the first batch."""
        counters = self.statistics
        return counters.images / counters.busy_seconds if counters and counters.busy_seconds else None


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool.

    Attributes:
        generation: the number of the current teacher; replicas of others are being replaced.
        newest_generation: counts the reloads; above ``generation`` if the last of them was given up.
        reloading: whether replicas of a former teacher are there to go back to.
        target: replicas wanted now, within ``low`` .. ``high``.
        fingerprint: of the teacher that the newest ready replica serves.
        restarts: replicas that were lost and replaced since the controller began.
        troubles: why replicas were lost or could not start, newest last.
    """

    name: str
    epoch: int
    generation: int
    newest_generation: int
    reloading: bool
    target: int
    low: int
    high: int
    replicas: tuple[ReplicaStatus, ...]
    fingerprint: str | None
    teacher: str
    batching: str
    clients: int
    restarts: int
    troubles: tuple[str, ...]

    @property
    def ready(self) -> int:
        """Replicas that take work."""
        return sum(replica.state == "ready" for replica in self.replicas)

    @property
    def images(self) -> int:
        """Images served by the replicas that are there now."""
        return sum(replica.statistics.images for replica in self.replicas if replica.statistics)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, for JSON."""
        return {**asdict(self), "ready": self.ready, "images": self.images}
