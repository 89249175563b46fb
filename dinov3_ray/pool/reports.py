"""What a controller tells of its pool: the view for clients, the status for people. Pure; both controllers use it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dinov3_ray.pool.membership import Membership, serial_of
from dinov3_ray.pool.messages import PoolView, ReplicaView, TeacherInfo
from dinov3_ray.pool.options import PoolOptions
from dinov3_ray.pool.replica_statistics import ReplicaStatistics
from dinov3_ray.pool.status import PoolStatus, ReplicaStatus

__all__ = ["Report", "make_status", "make_view"]


@dataclass(slots=True)
class Report:
    """What a controller knows of one replica beside its membership; None until it is heard of."""

    #: What clients send to: an actor handle, or a local replica.
    actor: Any
    node_id: str | None = None
    pid: int | None = None
    info: TeacherInfo | None = None
    statistics: ReplicaStatistics | None = None

    @property
    def fingerprint(self) -> str | None:
        return self.info.fingerprint if self.info else None


def newest_info(membership: Membership, reports: Mapping[str, Report]) -> TeacherInfo | None:
    """What the newest ready replica tells of its teacher; one of the current generation, if there is any."""
    newest = max(membership.ready(), key=lambda one: (one.generation == membership.generation, one.since), default=None)
    return reports[newest.replica_id].info if newest else None


def make_view(
    membership: Membership, reports: Mapping[str, Report], options: PoolOptions, *, closed: bool = False
) -> PoolView:
    """The pool as clients see it: the replicas that take work."""
    return PoolView(
        epoch=membership.epoch,
        replicas=tuple(
            ReplicaView(member.replica_id, report.actor, report.node_id or "", report.fingerprint)
            for member in membership.ready()
            for report in [reports[member.replica_id]]
        ),
        options=options,
        info=newest_info(membership, reports),
        target=membership.target,
        closed=closed,
        troubles=tuple(membership.troubles),
    )


def make_status(
    name: str, membership: Membership, reports: Mapping[str, Report], options: PoolOptions, *, clients: int
) -> PoolStatus:
    """The pool as people see it: all replicas, oldest first."""
    info, now = newest_info(membership, reports), time.monotonic()
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
                state=str(member.state),
                generation=member.generation,
                seconds_in_state=now - member.since,
                node_id=report.node_id,
                pid=report.pid,
                fingerprint=report.fingerprint,
                device=report.info.device if report.info else None,
                golden_cosine=report.info.golden_cosine if report.info else None,
                statistics=report.statistics,
            )
            for member in members
            for report in [reports[member.replica_id]]
        ),
        fingerprint=info.fingerprint if info else None,
        teacher=info.description if info else "",
        batching=options.batching,
        clients=clients,
        restarts=membership.restarts,
        troubles=tuple(membership.troubles),
    )
