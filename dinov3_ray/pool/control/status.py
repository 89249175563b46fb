"""What a controller answers about its pool: the status for people and scripts, and the view for clients.

Pure, and used by both controllers: the actor and the local one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dinov3_ray.pool.control.gpu_share import GpuShare
from dinov3_ray.pool.control.membership import Membership, serial_of
from dinov3_ray.pool.messages import MemberState, PoolView, ReplicaStatistics, ReplicaView, TeacherInfo
from dinov3_ray.pool.spec import Lifetime, PoolOptions

__all__ = ["PoolStatus", "ReplicaRecord", "ReplicaStatus", "make_status", "make_view"]


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica: its state (``starting``, ``ready`` or ``draining``), where it runs, and its counters."""

    replica_id: str
    state: MemberState
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
        recent_errors: why replicas were lost or could not start, newest last.
        gpus: how the pool and others share the cluster's GPUs; None where replicas need none.
        lifetime: ``process`` if it ends with the processes that hold it.
        origin: what that teacher was loaded from: ``owner/name@commit`` of the hub, or a directory; None if it does not
            say.
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
    recent_errors: tuple[str, ...]
    gpus: GpuShare | None = None
    lifetime: Lifetime = "process"
    origin: str | None = None

    @property
    def ready(self) -> int:
        """Replicas that take work."""
        return sum(replica.state == MemberState.READY for replica in self.replicas)

    @property
    def images(self) -> int:
        """Images served by the replicas that are there now."""
        return sum(replica.statistics.images for replica in self.replicas if replica.statistics)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, for JSON."""
        notice = self.gpus.notice if self.gpus else ""
        return {**asdict(self), "ready": self.ready, "images": self.images, "gpu_notice": notice}


@dataclass(slots=True)
class ReplicaRecord:
    """What a controller knows of one replica besides its membership; None until it is known."""

    #: What clients send to: an actor handle, or a local replica.
    actor: Any
    node_id: str | None = None
    pid: int | None = None
    info: TeacherInfo | None = None
    statistics: ReplicaStatistics | None = None

    @property
    def fingerprint(self) -> str | None:
        return self.info.fingerprint if self.info else None


def newest_info(membership: Membership, records: Mapping[str, ReplicaRecord]) -> TeacherInfo | None:
    """What the newest ready replica says of its teacher: one of the current generation, if any is ready."""
    newest = max(membership.ready(), key=lambda one: (one.generation == membership.generation, one.since), default=None)
    return records[newest.replica_id].info if newest else None


def make_view(
    membership: Membership,
    records: Mapping[str, ReplicaRecord],
    options: PoolOptions,
    *,
    closed: bool = False,
    why_closed: str = "",
) -> PoolView:
    """The pool as clients see it: the replicas that take work."""
    return PoolView(
        epoch=membership.epoch,
        replicas=tuple(
            ReplicaView(member.replica_id, record.actor, record.node_id or "", record.fingerprint)
            for member in membership.ready()
            for record in [records[member.replica_id]]
        ),
        options=options,
        info=newest_info(membership, records),
        target=membership.target,
        closed=closed,
        why_closed=why_closed,
        recent_errors=tuple(membership.recent_errors),
    )


def make_status(
    name: str,
    membership: Membership,
    records: Mapping[str, ReplicaRecord],
    options: PoolOptions,
    *,
    clients: int,
    gpus: GpuShare | None = None,
    lifetime: Lifetime = "process",
) -> PoolStatus:
    """The pool as people see it: all replicas, oldest first."""
    info, now = newest_info(membership, records), time.monotonic()
    members = sorted(membership.members, key=lambda member: serial_of(member.replica_id))
    return PoolStatus(
        name=name,
        epoch=membership.epoch,
        generation=membership.generation,
        newest_generation=membership.newest,
        reloading=membership.settled not in (None, membership.generation),
        target=membership.target,
        low=membership.low,
        high=membership.high,
        replicas=tuple(
            ReplicaStatus(
                replica_id=member.replica_id,
                state=member.state,
                generation=member.generation,
                seconds_in_state=now - member.since,
                node_id=record.node_id,
                pid=record.pid,
                fingerprint=record.fingerprint,
                device=record.info.device if record.info else None,
                golden_cosine=record.info.golden_cosine if record.info else None,
                statistics=record.statistics,
            )
            for member in members
            for record in [records[member.replica_id]]
        ),
        fingerprint=info.fingerprint if info else None,
        teacher=info.description if info else "",
        batching=options.batching,
        clients=clients,
        restarts=membership.restarts,
        recent_errors=tuple(membership.recent_errors),
        gpus=gpus,
        lifetime=lifetime,
        origin=info.origin if info else None,
    )
