"""Which processes a pool lives for: each holds it by a small actor, which Ray ends with the process, however it ends.

An actor that is not detached ends with the process that owns it, be that a driver, an actor or a task, on any node, and
killed or not. So the controller waits for a call to it that returns only if the actor finds the process gone: Ray takes
a killed process for alive while a fork of it, such as a DataLoader's worker, has its connections open.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dinov3_ray.pool.cluster import list_named, process_start

__all__ = ["Holder", "Holders", "holding_process", "release_hold", "take_hold"]


_PREFIX = "dinov3-holder"
_RETRY = 0.5
_LOOK_SECONDS = 1.0

#: This process's holders by name. A handle that nobody has any more would end its actor.
_held: dict[str, Any] = {}


class Holder:
    """The actor, on the node of its process if there is room.

    Args:
        pid, started: of the process; see :func:`~dinov3_ray.pool.cluster.process_start`.
    """

    def __init__(self, pid: int, started: str) -> None:
        self._pid, self._started = pid, started
        # The process may have ended when somebody asks: a controller that has just been restarted, say.
        self._was_seen = self._is_alive()

    async def hold(self) -> None:
        """Returns when the process is gone; never if it cannot be seen from here."""
        while not self._was_seen or self._is_alive():
            await asyncio.sleep(_LOOK_SECONDS)

    def _is_alive(self) -> bool:
        return bool(self._started) and process_start(self._pid) == self._started


def holding_process(name: str) -> str:
    """The process of a holder, in words."""
    return name.split("/")[2]


def take_hold(namespace: str, pool: str) -> str:
    """Make a holder that ends with this process; returns its name."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    name = f"{_PREFIX}/{pool}/process {os.getpid()} on {host}/{uuid.uuid4().hex[:8]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {"name": name, "namespace": namespace, "num_cpus": 0, "max_restarts": -1}
    options |= {"scheduling_strategy": here, "max_concurrency": 1000}
    pid = os.getpid()
    _held[name] = ray.remote(Holder).options(**options).remote(pid, process_start(pid))
    return name


def release_hold(name: str | None) -> None:
    """End a holder of this process, if it is there."""
    holder = _held.pop(name or "", None)
    if holder is not None:
        ray.kill(holder)


class Holders:
    """The processes that hold one pool, as its controller sees them. Nothing here needs a lock: it is one asyncio loop.

    Args:
        spawn: starts a task.
        on_end: called with the name of the last holder, when it has ended.
    """

    def __init__(
        self,
        namespace: str,
        pool: str,
        spawn: Callable[[Coroutine[Any, Any, None]], Any],
        on_end: Callable[[str], Coroutine[Any, Any, None]],
    ) -> None:
        self._namespace, self._pool = namespace, pool
        self._spawn, self._on_end = spawn, on_end
        self._names: set[str] = set()

    def find(self) -> None:
        """Add the holders that there are, after a restart of the controller."""
        for name in list_named(self._namespace, f"{_PREFIX}/{self._pool}/"):
            self.add(name)

    def add(self, name: str) -> None:
        if name not in self._names:
            self._names.add(name)
            self._spawn(self._watch(name))

    def remove(self, name: str) -> bool:
        """A holder has left. Whether it was the last one."""
        was_there = name in self._names
        self._names.discard(name)
        return was_there and not self._names

    def end(self) -> None:
        """End all holders: the pool has ended."""
        names, self._names = self._names, set()
        for name in names:
            self._end_actor(name)

    def _end_actor(self, name: str) -> None:
        with contextlib.suppress(ValueError):  # it has ended
            ray.kill(ray.get_actor(name, namespace=self._namespace))

    async def _watch(self, name: str) -> None:
        while name in self._names:
            try:
                await ray.get_actor(name, namespace=self._namespace).hold.remote()
                break
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(_RETRY)  # its node or process died, not its owner: Ray restarts it
            except (ValueError, ray.exceptions.RayError):
                break
        self._end_actor(name)
        if self.remove(name):
            await self._on_end(name)
