"""Calls the controller of a pool from another process, and waits until the pool is what was asked for.

A call to a controller that is being restarted is repeated.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent import futures
from functools import partial
from typing import Any, Protocol

import ray

from dinov3_ray.errors import (
    PoolClosedError,
    PoolError,
    PoolExistsError,
    PoolNotFoundError,
    PoolTimeoutError,
    ReplicaError,
)
from dinov3_ray.pool.cluster import Runtime, controller_name, find_controller, list_actors
from dinov3_ray.pool.control.controller import Controller
from dinov3_ray.pool.control.declaration import Declaration, PoolChange
from dinov3_ray.pool.control.holders import release_hold, take_hold
from dinov3_ray.pool.control.process_end import kill_process
from dinov3_ray.pool.control.status import PoolStatus
from dinov3_ray.pool.messages import MemberState
from dinov3_ray.pool.replica.actor import ReplicaProcess
from dinov3_ray.pool.spec import CheckedTeacher, Placement, PoolOptions, pickle_teacher

__all__ = ["RayControl", "end_replicas", "wait_ready"]


log = logging.getLogger("dinov3_ray")

_PATIENCE = 60.0  # seconds in which a killed controller is back, with room to spare
_RETRY = 0.2
_LISTEN_SECONDS = 30.0
_WATCHERS = 10_000  # clients that may be in a call to the controller at the same time


def end_replicas(runtime: Runtime, namespace: str, pool: str, timeout: float = 20.0) -> list[str]:
    """End the replicas of a pool whose controller is gone, and wait until they have ended.

    Returns:
        Their ids.

    Raises:
        PoolTimeoutError: some are still there, ``timeout`` seconds later.
    """
    deadline = time.monotonic() + timeout
    found: set[str] = set()
    while True:
        with runtime.held():
            leftover = list_actors(namespace, pool)
            for replica_id, actor in leftover:
                found.add(replica_id)
                ray.kill(actor)
        if not leftover:
            return sorted(found)
        if time.monotonic() > deadline:
            names = ", ".join(replica_id for replica_id, _ in leftover)
            raise PoolTimeoutError(f"replicas {names} of pool {pool!r} did not end within {timeout:g} s")
        time.sleep(_RETRY)


class RayControl:
    """Controls one pool through its controller actor."""

    def __init__(self, name: str, namespace: str, runtime: Runtime, controller: Any, holder: str | None = None) -> None:
        self.name = name
        self._namespace = namespace
        self._runtime = runtime
        self._controller = controller
        self._holder = holder

    @classmethod
    def start(cls, name: str, namespace: str, runtime: Runtime, declaration: Declaration) -> RayControl:
        """Start the controller of a new pool; it starts the replicas.

        Raises:
            PoolExistsError: a pool of that name is running.
        """
        actor_class = ray.remote(Controller)
        holder = take_hold(namespace, name) if declaration.lifetime == "process" else None
        try:
            controller = actor_class.options(
                name=controller_name(name),
                namespace=namespace,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=_WATCHERS,
            ).remote(namespace, name, declaration, holder)
        except ValueError as error:
            release_hold(holder)
            raise PoolExistsError(
                f"a pool named {name!r} is running already in namespace {namespace!r}: connect to it with "
                f"TeacherPool.connect({name!r}), join it with TeacherPool.start(..., exist='connect'), or end it with "
                f"`dinov3-ray down --name {name}`"
            ) from error
        control = cls(name, namespace, runtime, controller, holder)
        threading.Thread(target=control._listen, name=f"dinov3-notices-{name}", daemon=True).start()
        return control

    @classmethod
    def connect(cls, name: str, namespace: str, runtime: Runtime) -> RayControl:
        """Control a pool that is running.

        Raises:
            PoolNotFoundError: there is none of that name.
        """
        return cls(name, namespace, runtime, find_controller(name, namespace))

    @property
    def address(self) -> str:
        return self._runtime.address

    @property
    def holds(self) -> bool:
        """Whether the pool lives for this process."""
        return self._holder is not None

    def loss(self) -> PoolError | None:
        """What tells a caller that this process has left the pool's Ray; None if it has not."""
        return self._runtime.loss()

    def status(self) -> PoolStatus:
        status = self._call("status")
        assert isinstance(status, PoolStatus)
        return status

    def scale(self, low: int, high: int) -> None:
        self._call("scale", low, high)

    def declaration(self) -> Declaration:
        """The pool as it was last declared."""
        declared = self._call("declaration")
        assert isinstance(declared, Declaration)
        return declared

    def change(
        self, teacher: CheckedTeacher, *, placement: Placement | None = None, options: PoolOptions | None = None
    ) -> int:
        """Begin to replace the replicas by such with another teacher, placement or options; None leaves them unchanged.

        Returns:
            The number of their generation.
        """
        change = PoolChange(uuid.uuid4().hex, pickle_teacher(teacher), placement, options)
        return int(self._call("change", change))

    def reload(self, teacher: CheckedTeacher) -> int:
        return self.change(teacher)

    def hold(self) -> None:
        """Have the pool live for this process too.

        Raises:
            PoolNotFoundError: it is ending.
        """
        with self._runtime.held():
            self._holder = take_hold(self._namespace, self.name)
        try:
            if not self._call("hold", self._holder):
                raise PoolNotFoundError(f"pool {self.name!r} is being shut down")
        except PoolNotFoundError:
            with self._runtime.held():
                release_hold(self._holder)
            raise

    def release(self) -> None:
        """No longer hold the pool: it ends if no other process holds it.

        Raises:
            PoolTimeoutError: it should end, and does not.
        """
        if self._holder is None:
            return
        processes: list[ReplicaProcess] | None = None
        with contextlib.suppress(PoolNotFoundError):
            processes = self._call("release", self._holder)
        if processes is not None:
            self._finish(processes)
        else:
            with self._runtime.held():
                release_hold(self._holder)

    def shutdown(self, timeout: float = 20.0) -> None:
        """End replicas and controller, and wait until they are gone.

        Raises:
            PoolTimeoutError: some are not, ``timeout`` seconds later.
        """
        try:
            processes: list[ReplicaProcess] = self._call("shutdown")
        except PoolNotFoundError:
            if self._has_successor():
                return  # somebody else ended it, and started another of its name
            processes = []
        self._finish(processes, timeout)

    def _finish(self, processes: list[ReplicaProcess], timeout: float = 20.0) -> None:
        with self._runtime.held():
            ray.kill(self._controller, no_restart=True)
        end_replicas(self._runtime, self._namespace, self.name, timeout)
        with self._runtime.held():
            kills = self._end_stopped_processes(processes)
        for kill in futures.wait(kills, timeout=10).done:
            if not kill.exception() and kill.result():
                log.warning("pool %s has ended, but %s", self.name, kill.result())
        with self._runtime.held():
            release_hold(self._holder)

    def _has_successor(self) -> bool:
        """Whether another pool has this one's name by now."""
        try:
            with self._runtime.held():
                return bool(find_controller(self.name, self._namespace) != self._controller)
        except PoolNotFoundError:
            return False

    def _end_stopped_processes(self, processes: list[ReplicaProcess]) -> list[futures.Future[Any]]:
        """Kill processes that did not end when Ray asked them to: stopped ones (SIGSTOP), or stuck in a driver."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return [kill_process(process).future() for process in processes if process.node_id in alive]

    def _listen(self) -> None:
        """Log what the controller finds people should know, in this process too: Ray hides what its actors log."""
        known = ""
        while True:
            before = known
            try:
                known = self._runtime.fetch(partial(self._controller.notice.remote, before, _LISTEN_SECONDS), _PATIENCE)
            except ray.exceptions.ActorUnavailableError:
                time.sleep(_RETRY)
            except (PoolClosedError, TimeoutError, ray.exceptions.RayError):
                return  # the pool has ended, or cannot be heard
            if known and known != before:
                log.warning("pool %s: %s", self.name, known)

    def disconnect(self) -> None:
        """Disconnect from Ray, if this process connected to it for this pool."""
        self._runtime.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call the controller; repeat the call while it is being restarted."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return self._runtime.fetch(lambda: getattr(self._controller, method).remote(*arguments), _PATIENCE)
            except ray.exceptions.ActorUnavailableError as error:
                if time.monotonic() > deadline:
                    raise PoolTimeoutError(
                        f"the controller of pool {self.name!r} has not been reachable for {_PATIENCE:g} s: {error}"
                    ) from error
                log.debug("controller of pool %s is away: %s", self.name, error)
                time.sleep(_RETRY)
            except ray.exceptions.ActorDiedError as error:
                if error.actor_init_failed:
                    raise PoolNotFoundError(
                        f"pool {self.name!r} does not run, since its controller cannot start: "
                        f"{str(error).strip().splitlines()[-1]}. Do the cluster's nodes have this process's version of "
                        "dinov3_ray? `dinov3-ray doctor --address HOST:PORT` compares them"
                    ) from error
                raise PoolNotFoundError(f"pool {self.name!r} has been shut down") from error
            except TimeoutError as error:
                raise PoolTimeoutError(
                    f"the controller of pool {self.name!r} did not answer {method} within {_PATIENCE:g} s"
                ) from error
            except ray.exceptions.RaySystemError as error:
                raise PoolError(f"Ray failed while calling {method} of pool {self.name!r}: {error}") from error


_POLL = 0.02
_RESTARTS_BEFORE_GIVING_UP = 2  # failed starts, none having succeeded, after which a new pool is given up


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
        on_status: called with each status until then.

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
        ready = sum(replica.state == MemberState.READY for replica in current)
        if ready >= status.low and len(status.replicas) <= status.high and len(current) == len(status.replicas):
            return status
        restarts = status.restarts if restarts is None else restarts
        if status.restarts >= restarts + _RESTARTS_BEFORE_GIVING_UP and not ready and not status.reloading:
            raise ReplicaError(f"the replicas of pool {name!r} do not start. {_last_error(status)}")
        if time.monotonic() > deadline:
            raise PoolTimeoutError(
                f"pool {name!r} had {ready} of {status.low} replicas ready after timeout={timeout:g} s: "
                f"{_waits_for(status)}"
            )
        time.sleep(_POLL)


def _turned(name: str, generation: int, status: PoolStatus) -> PoolError:
    """Why the pool will not become ``generation``."""
    if status.newest_generation > generation:
        return PoolError(f"pool {name!r}: another reload has overtaken this one")
    return ReplicaError(
        f"the new replicas of pool {name!r} do not start, so it has gone back to the former teacher "
        f"({status.ready} of {status.target} ready). {_last_error(status)}"
    )


def _last_error(status: PoolStatus) -> str:
    # A controller that was started again does not have the errors of the one before.
    return (
        status.recent_errors[-1]
        if status.recent_errors
        else "The reason was lost when the controller was started again; its log has it."
    )


def _waits_for(status: PoolStatus) -> str:
    if status.recent_errors:
        return f"last error: {status.recent_errors[-1]}"
    if any(replica.pid is None for replica in status.replicas):
        have = ray.cluster_resources() if ray.is_initialized() else {}
        counts = ", ".join(f"{have.get(key, 0):g} {key}" for key in ("GPU", "CPU"))
        shared = f"; {status.gpus.notice}" if status.gpus and status.gpus.notice else ""
        return f"some wait for a place in the cluster (it has {counts} in all){shared}"
    return "they are loading their teacher (a model of the hub must first be downloaded: give that more time)"
