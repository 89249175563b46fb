"""How a pool and the rest of a cluster share its GPUs: who has them, who waits for them, and what to do about it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply  # private, seen in Ray 2.60.0

__all__ = ["GpuShare", "GpuWatch", "read_gpus"]


log = logging.getLogger("dinov3_ray")

_LOOK_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class GpuShare:
    """GPUs of a cluster.

    Attributes:
        total: that it has.
        free: that nobody has.
        held: that the pool's replicas have.
        waiting: that the pool's replicas wait for.
        others_waiting: that others wait for, such as a trainer's placement group.
    """

    total: float = 0.0
    free: float = 0.0
    held: float = 0.0
    waiting: float = 0.0
    others_waiting: float = 0.0

    @property
    def notice(self) -> str:
        """What people should know, with the remedy; "" if nobody waits."""
        of_all = f"of the cluster's {_in_words(self.total)} this pool holds {self.held:g}, others {self._others:g}"
        if self.waiting:
            return (
                f"replicas wait for {_in_words(self.waiting)}: {of_all}; {self.free:g} are free. End what holds them, "
                "make the pool smaller (scale), or start it with fewer replicas or a smaller num_gpus"
            )
        if self.others_waiting and self.held:
            return (
                f"others wait for {_in_words(self.others_waiting)}, such as a trainer: {of_all}; {self.free:g} are "
                "free. Make the pool smaller (scale), or start it with leave_gpus=N, which leaves N GPUs to them"
            )
        return ""

    @property
    def _others(self) -> float:
        return max(0.0, self.total - self.free - self.held)


class GpuWatch:
    """Looks now and then who has the cluster's GPUs and who waits for them, and logs what stays so.

    Attributes:
        seen: at the last look.
    """

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self.seen: GpuShare | None = None
        self._before: GpuShare | None = None
        self._next_look = 0.0

    @property
    def notice(self) -> str:
        """What people should know: what was so at the last two looks."""
        now, before = self.seen, self._before
        return now.notice if now and before and before.notice else ""

    async def look(self, now: float, *, wanted: float, unplaced: float) -> None:
        """See :func:`read_gpus`. A look within two seconds of the last one, or for a pool without GPUs, is left out."""
        if not wanted or now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        before = self.notice
        try:
            seen = await asyncio.to_thread(read_gpus, wanted=wanted, unplaced=unplaced)
        except Exception as error:  # noqa: BLE001 - it is read off Ray's own protocol, and nothing depends on it
            log.debug("pool %s: the cluster's GPUs cannot be read: %s", self._pool, error)
            return
        # What waits for a moment only, such as a replica that is being placed, is nobody's trouble.
        self._before, self.seen = self.seen, seen
        if self.notice and self.notice != before:
            log.warning("pool %s: %s", self._pool, self.notice)


def read_gpus(*, wanted: float, unplaced: float) -> GpuShare:
    """The cluster's GPUs now, for a pool that wants some for its replicas, of which some have not reported their place.

    It asks Ray's head, and waits for the answer: not for an event loop.
    """
    total, free = ray.cluster_resources().get("GPU", 0.0), ray.available_resources().get("GPU", 0.0)
    # A replica that has a place, and whose process is starting, waits for none.
    pending = _pending_gpus()
    waiting = min(unplaced, pending)
    return GpuShare(total=total, free=free, held=wanted - waiting, waiting=waiting, others_waiting=pending - waiting)


def _in_words(gpus: float) -> str:
    return f"{gpus:g} GPU{'' if gpus == 1 else 's'}"


def _pending_gpus() -> float:
    """GPUs that tasks, actors and placement groups wait for."""
    reply = GetClusterResourceStateReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_resource_state())
    state = reply.cluster_resource_state
    alone: float = sum(_gpus(one.request.resources_bundle) * one.count for one in state.pending_resource_requests)
    return alone + sum(
        _gpus(one.resources_bundle) for gang in state.pending_gang_resource_requests for one in gang.requests
    )


def _gpus(bundle: Mapping[str, Any]) -> float:
    return float(bundle.get("GPU", 0.0))
