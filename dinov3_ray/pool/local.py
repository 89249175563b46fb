"""A pool without Ray: replicas are threads of this process, behind the same router, batching and wire code.

It is for tests and first steps on one machine: a pool starts in milliseconds. It cannot outlive its process, nor end a
replica that hangs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dinov3_ray.errors import PoolExistsError
from dinov3_ray.pool.cluster import connect, find_controller
from dinov3_ray.pool.control.membership import ActionKind, Membership
from dinov3_ray.pool.control.status import PoolStatus, ReplicaRecord, make_status, make_view
from dinov3_ray.pool.messages import Array, MemberState, PoolView, ReplicaView, RequestHeader
from dinov3_ray.pool.metrics import Sample
from dinov3_ray.pool.replica.replica import Replica
from dinov3_ray.pool.spec import CheckedTeacher, PoolSpec, builder
from dinov3_ray.pool.transport.actors import RayTransport
from dinov3_ray.pool.transport.protocol import OnAnswer, OnView, Transport

__all__ = ["LocalController", "LocalTransport", "local_pool", "open_transport", "register_local", "unregister_local"]


_NODE = "local"
_LOOK_SECONDS = 0.5
_MAX_BYTES = 2**30


class LocalController:
    """Starts, scales and reloads replicas that are threads. Its thread ends with :meth:`shutdown`.

    Args:
        device: on which all replicas compute, with its index: the current device of their threads is another.
    """

    def __init__(self, name: str, spec: PoolSpec, device: str) -> None:
        self.name = name
        self.address: str | None = None  # no other process can reach it
        self._spec = self._former = spec
        self._device = device
        self._holds = 1
        self._membership = Membership(spec.low, spec.high)
        self._replicas: dict[str, Replica] = {}
        self._followers: list[tuple[int, OnView]] = []
        self._clients: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._supervise, name=f"dinov3-{name}", daemon=True)
        self._thread.start()

    # What pools and clients call ------------------------------------------------------------------------------------

    def follow(self, client_id: str, known_epoch: int, on_view: OnView) -> None:
        with self._changed:
            self._clients.add(client_id)
            self._followers.append((known_epoch, on_view))
            self._changed.notify_all()

    def leave(self, client_id: str) -> None:
        with self._changed:
            self._clients.discard(client_id)
            replicas = list(self._replicas.values())
        for replica in replicas:
            replica.forget(client_id)

    def scale(self, low: int, high: int) -> None:
        with self._changed:
            self._membership.scale(low, high)
            self._changed.notify_all()

    def reload(self, teacher: CheckedTeacher) -> int:
        with self._changed:
            if self._membership.reload():
                self._former = self._spec
            self._spec = replace(self._spec, teacher=teacher)
            self._changed.notify_all()
            return self._membership.generation

    def status(self) -> PoolStatus:
        with self._changed:
            clients = len(self._clients)
            return make_status(self.name, self._membership, self._records(), self._spec.options, clients=clients)

    @property
    def spec(self) -> PoolSpec:
        return self._spec

    @property
    def holds(self) -> bool:
        """Whether the pool lives for this process."""
        return True

    def loss(self) -> None:
        """Nothing can come between the pool and this process."""

    def hold(self) -> None:
        """One more has started it, with ``exist="connect"``."""
        with self._changed:
            self._holds += 1

    def release(self) -> None:
        """One of them has shut it down: the last one ends it."""
        with self._changed:
            self._holds -= 1
            last = not self._holds
        if last:
            self.shutdown()

    def shutdown(self) -> None:
        unregister_local(self)
        with self._changed:
            self._closed = True
            self._membership.epoch += 1
            self._changed.notify_all()
            replicas = list(self._replicas.values())
        self._thread.join()
        for replica in replicas:
            replica.stop()

    def disconnect(self) -> None:
        """There is no connection to close."""

    # The thread -----------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if self._membership.is_hopeless:
                    self._spec = self._former
                    self._membership.go_back()
                for action in self._membership.plan(now):
                    if action.kind is ActionKind.START:
                        self._start(action.replica_id)
                    else:
                        self._replicas[action.replica_id].drain()
                self._end_drained()
                self._publish()
                delayed = self._membership.next_change(now)
                self._changed.wait(_LOOK_SECONDS if delayed is None else min(delayed, _LOOK_SECONDS))
            self._publish()

    def _start(self, replica_id: str) -> None:
        spec = self._spec
        replica = Replica(
            replica_id,
            builder(spec.given, self._device),
            # No thread count: it would be this whole process's.
            spec.options.model_copy(update={"threads": None}),
            unnamed=f"generation-{self._membership.generation}",
        )
        self._replicas[replica_id] = replica

        def loaded(future: Any) -> None:
            with self._changed:
                error, now = future.exception(), time.monotonic()
                if error is None:
                    self._membership.became_ready(replica_id, now)
                elif self._membership.lost(replica_id, f"{type(error).__name__}: {error}", now):
                    del self._replicas[replica_id]
                self._changed.notify_all()

        replica.start().add_done_callback(loaded)

    def _end_drained(self) -> None:
        for member in self._membership.members:
            replica = self._replicas[member.replica_id]
            if member.state is MemberState.DRAINING and replica.loaded.done() and replica.wait_idle(0):
                self._membership.drained(member.replica_id)
                # The device thread may be about to report here, which takes the lock that is held: don't wait for it.
                self._replicas.pop(member.replica_id).stop(timeout=0)

    def _publish(self) -> None:
        epoch = self._membership.epoch
        due = [on_view for known, on_view in self._followers if known != epoch]
        self._followers = [(known, on_view) for known, on_view in self._followers if known == epoch]
        view = self._view()
        for on_view in due:
            on_view(view)

    def _view(self) -> PoolView:
        return make_view(self._membership, self._records(), self._spec.options, closed=self._closed)

    def _records(self) -> dict[str, ReplicaRecord]:
        return {replica_id: record_of(replica) for replica_id, replica in self._replicas.items()}


def record_of(replica: Replica) -> ReplicaRecord:
    ready = replica.loaded.done() and replica.loaded.exception() is None
    info = replica.loaded.result() if ready else None
    return ReplicaRecord(replica, node_id=_NODE, info=info, statistics=replica.statistics())


class LocalTransport:
    """Carries one client's requests to a local pool; see :class:`~dinov3_ray.pool.transport.protocol.Transport`."""

    node_id = _NODE
    default_max_bytes = _MAX_BYTES

    def __init__(self, controller: LocalController) -> None:
        self._controller = controller

    def loss(self) -> None:
        """Nothing can come between it and its pool."""

    def follow(self, client_id: str, known_epoch: int, on_view: OnView) -> None:
        self._controller.follow(client_id, known_epoch, on_view)

    def stage(self, arrays: Sequence[Array], *, send_now: bool) -> list[Any]:  # noqa: ARG002 - there is no store
        return [np.array(array) for array in arrays]

    def send(
        self, replica: ReplicaView, header: RequestHeader, staged: list[Any], on_answer: OnAnswer
    ) -> Callable[[], None]:
        replica.actor.offer(header, staged, lambda answer, arrays: on_answer((answer, arrays)))
        return lambda: None  # it is computed, and its answer dropped

    def adopt(self, arrays: list[Array]) -> list[Array]:
        # The teacher may hand out memory that it keeps: the store would have copied it, so it is copied here.
        return [np.array(array) for array in arrays]

    def was_computing(self, replica_id: str, request_id: str) -> bool:  # noqa: ARG002
        return False  # a thread does not die of a request

    def report_sick(self, replica_id: str, reason: str) -> None:
        """Nothing to do: the replica's own counters show it, and a thread cannot be replaced."""

    def publish(self, samples: Iterable[Sample]) -> None:
        """Nothing to do: metrics are published through Ray."""

    def leave(self, client_id: str) -> None:
        self._controller.leave(client_id)


_local_pools: dict[str, LocalController] = {}
_lock = threading.Lock()


def register_local(controller: LocalController) -> None:
    """Make a local pool known by its name in this process."""
    with _lock:
        if controller.name in _local_pools:
            raise PoolExistsError(f"a local pool named {controller.name!r} is running in this process already")
        _local_pools[controller.name] = controller


def unregister_local(controller: LocalController) -> None:
    """Forget a local pool; one that has its name by now is left alone."""
    with _lock:
        if _local_pools.get(controller.name) is controller:
            del _local_pools[controller.name]


def local_pool(name: str) -> LocalController | None:
    """The local pool of that name in this process."""
    with _lock:
        return _local_pools.get(name)


def open_transport(name: str, namespace: str, address: str | None) -> tuple[Transport, str | None]:
    """The transport to a pool, and the address at which another process finds it; None for a pool of this process."""
    local = local_pool(name) if address is None else None
    if local is not None:
        return LocalTransport(local), None
    runtime = connect(address)
    with runtime.held():
        return RayTransport(find_controller(name, namespace), namespace, name, runtime), runtime.address
