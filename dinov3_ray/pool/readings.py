"""What replicas, clients and the controller publish of themselves, as plain readings for ``metrics``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from dinov3_ray.metrics import Reading
from dinov3_ray.pool.membership import Membership, MemberState
from dinov3_ray.pool.replica_statistics import ReplicaStatistics
from dinov3_ray.pool.routing import RoutingStatistics

__all__ = ["ClientSeconds", "read_client", "read_controller", "read_replica"]


@dataclass(slots=True)
class ClientSeconds:
    """Where one client's time went, so far.

    Attributes:
        transfer: of requests, between this client and their replicas: the round trip without the replica's own time.
        trainer: of loops over ``prefetch``.
        trainer_wait: of these, waiting for the teacher.
    """

    transfer: float = 0.0
    trainer: float = 0.0
    trainer_wait: float = 0.0

    def add_step(self, waited: float, seconds: float) -> None:
        """Count one step of a training loop."""
        self.trainer += seconds
        self.trainer_wait += waited


def read_replica(statistics: ReplicaStatistics) -> Iterator[Reading]:
    yield Reading("dinov3_images", statistics.images)
    yield Reading("dinov3_batches", statistics.batches)
    yield Reading("dinov3_errors", statistics.errors)
    yield Reading("dinov3_rejected", statistics.rejected)
    yield Reading("dinov3_stage_seconds", statistics.queue_seconds, "queue")
    yield Reading("dinov3_stage_seconds", statistics.preprocess_seconds, "preprocess")
    yield Reading("dinov3_stage_seconds", statistics.forward_seconds, "forward")
    yield Reading("dinov3_stage_seconds", statistics.pack_seconds, "pack")
    yield Reading("dinov3_queued", statistics.waiting)


def read_client(routing: RoutingStatistics, seconds: ClientSeconds) -> Iterator[Reading]:
    yield Reading("dinov3_answers", routing.answered)
    yield Reading("dinov3_retries", routing.resends)
    yield Reading("dinov3_stage_seconds", seconds.transfer, "transfer")
    yield Reading("dinov3_in_flight", routing.in_flight)
    yield Reading("dinov3_in_flight_bytes", routing.in_flight_bytes)
    yield Reading("dinov3_waiting", routing.waiting)
    yield Reading("dinov3_trainer_seconds", seconds.trainer)
    yield Reading("dinov3_trainer_wait_seconds", seconds.trainer_wait)


def read_controller(membership: Membership, *, clients: int) -> Iterator[Reading]:
    counts = Counter(member.state for member in membership.members)
    for state in MemberState:
        yield Reading("dinov3_replicas", counts[state], str(state))
    yield Reading("dinov3_replicas_target", membership.target)
    yield Reading("dinov3_clients", clients)
    yield Reading("dinov3_restarts", membership.restarts)
