"""What a replica counts of its own work."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ReplicaStatistics"]


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """Counters since the replica started, ``uptime`` seconds ago, and how it stands now.

    ``batches`` counts forward passes; ``errors_in_a_row`` the requests that raised since one was answered, each once
    however often it was sent (one bad request is no sign of a bad replica). ``preprocess_seconds`` is known of teachers
    that tell it in an attribute ``preprocess_seconds`` (on a CUDA device, ``preprocess_watch``), as the local one does;
    of others it is part of ``forward_seconds``. Where passes overlap, none is charged with the time in which another
    was ahead of it, so that the stages' sum is what the device was busy. ``busy_for`` is how long the pass that is
    ahead of all others has been so.
    """

    uptime: float = 0.0
    images: int = 0
    batches: int = 0
    queue_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    forward_seconds: float = 0.0
    pack_seconds: float = 0.0
    errors: int = 0
    errors_in_a_row: int = 0
    rejected: int = 0
    waiting: int = 0
    waiting_rows: int = 0
    clients_backlog: int = 0
    oldest_wait: float = 0.0
    busy_for: float = 0.0

    @property
    def busy_seconds(self) -> float:
        """What the device has spent on requests that were answered."""
        return self.preprocess_seconds + self.forward_seconds + self.pack_seconds
