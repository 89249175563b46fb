"""A pool in Ray as the process that steers it sees it: calls to the controller, with patience for one that restarts."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dinov3_ray.errors import PoolError, PoolExistsError, PoolNotFoundError, PoolTimeoutError
from dinov3_ray.pool.cluster import Runtime, controller_name, find_controller, list_actors
from dinov3_ray.pool.controller import Controller
from dinov3_ray.pool.declaration import Declaration, Placement, Redeclaration
from dinov3_ray.pool.options import PoolOptions
from dinov3_ray.pool.processes import kill_process
from dinov3_ray.pool.replica_actor import Place
from dinov3_ray.pool.source import CheckedSource
from dinov3_ray.pool.status import PoolStatus

__all__ = ["RayControl", "end_replicas"]

log = logging.getLogger("dinov3_ray")

_PATIENCE = 60.0  # seconds in which a killed controller is back, with room to spare
_RETRY = 0.2
_WATCHERS = 10_000  # clients that may be in a call to the controller at the same time


def end_replicas(namespace: str, pool: str, timeout: float = 20.0) -> list[str]:
    """End the replicas of a pool that has no controller any more, and wait until they are gone.

    Returns:
        Which there were.

    Raises:
        PoolTimeoutError: some are still there, ``timeout`` seconds later.
    """
    deadline = time.monotonic() + timeout
    found: set[str] = set()
    while leftover := list_actors(namespace, pool):
        for replica_id, actor in leftover:
            found.add(replica_id)
            ray.kill(actor)
        if time.monotonic() > deadline:
            names = ", ".join(replica_id for replica_id, _ in leftover)
            raise PoolTimeoutError(f"replicas {names} of pool {pool!r} did not end within {timeout:g} s")
        time.sleep(_RETRY)
    return sorted(found)


class RayControl:
    """Steers one pool through its controller actor."""

    def __init__(self, name: str, namespace: str, runtime: Runtime, controller: Any) -> None:
        self.name = name
        self._namespace = namespace
        self._runtime = runtime
        self._controller = controller

    @classmethod
    def start(cls, name: str, namespace: str, runtime: Runtime, declaration: Declaration) -> RayControl:
        """Start the controller of a new pool; it starts the replicas.

        Raises:
            PoolExistsError: a pool of that name is running.
        """
        actor_class = ray.remote(Controller)
        try:
            controller = actor_class.options(
                name=controller_name(name),
                namespace=namespace,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=_WATCHERS,
            ).remote(namespace, name, declaration)
        except ValueError as error:
            raise PoolExistsError(
                f"a pool named {name!r} is running already in namespace {namespace!r}: connect to it with "
                f"TeacherPool.connect({name!r}), or end it with `dinov3-ray down --name {name}`"
            ) from error
        return cls(name, namespace, runtime, controller)

    @classmethod
    def connect(cls, name: str, namespace: str, runtime: Runtime) -> RayControl:
        """Steer a pool that is running.

        Raises:
            PoolNotFoundError: there is none of that name.
        """
        return cls(name, namespace, runtime, find_controller(name, namespace))

    @property
    def address(self) -> str:
        return self._runtime.address

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

    def redeclare(
        self, source: CheckedSource, *, placement: Placement | None = None, options: PoolOptions | None = None
    ) -> int:
        """Begin to replace the replicas by such with another teacher, placement (None: as it is) or options (likewise).

        Returns:
            The number of their generation.
        """
        change = Redeclaration(uuid.uuid4().hex, cloudpickle.dumps(source), placement, options)
        return int(self._call("redeclare", change))

    def reload(self, source: CheckedSource) -> int:
        return self.redeclare(source)

    def shutdown(self, timeout: float = 20.0) -> None:
        """End replicas and controller, and wait until they are gone.

        Raises:
            PoolTimeoutError: some are not, ``timeout`` seconds later.
        """
        try:
            places: list[Place] = self._call("shutdown")
        except PoolNotFoundError:
            if self._has_successor():
                return  # somebody else ended it, and started another of its name
            places = []
        ray.kill(self._controller, no_restart=True)
        end_replicas(self._namespace, self.name, timeout)
        self._end_stopped_processes(places)

    def _has_successor(self) -> bool:
        """Whether another pool has this one's name by now."""
        try:
            return bool(find_controller(self.name, self._namespace) != self._controller)
        except PoolNotFoundError:
            return False

    def _end_stopped_processes(self, places: list[Place]) -> None:
        """Ray asks a process to end itself, which one that is stopped (SIGSTOP) or stuck in a driver does not hear."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        calls = [
            kill_process.options(scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False)).remote(
                place.pid, place.started
            )
            for place in places
            if place.node_id in alive
        ]
        ray.wait(calls, num_returns=len(calls), timeout=10) if calls else None

    def disconnect(self) -> None:
        """Part from Ray, if this process joined or started it for the pool's sake."""
        self._runtime.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call the controller; while it is being restarted, again."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return ray.get(getattr(self._controller, method).remote(*arguments), timeout=_PATIENCE)
            except ray.exceptions.ActorUnavailableError as error:
                if time.monotonic() > deadline:
                    raise PoolTimeoutError(
                        f"the controller of pool {self.name!r} has been away for {_PATIENCE:g} s: {error}"
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
            except ray.exceptions.GetTimeoutError as error:
                raise PoolTimeoutError(
                    f"the controller of pool {self.name!r} did not answer {method} within {_PATIENCE:g} s"
                ) from error
            except ray.exceptions.RaySystemError as error:
                raise PoolError(f"Ray failed while calling {method} of pool {self.name!r}: {error}") from error
