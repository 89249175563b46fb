"""Connects this process to Ray, finds a pool's actors by their names, and kills processes of its nodes."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from dinov3_ray.errors import ConfigError, ForkedProcessError, PoolError, PoolNotFoundError
from dinov3_ray.pool.probe import find_obstacle

__all__ = [
    "NAMESPACE",
    "Runtime",
    "check_name",
    "connect",
    "controller_name",
    "find_controller",
    "kill_process",
    "list_actors",
    "list_pools",
    "process_start",
    "replica_name",
]


#: The default Ray namespace of pools, whatever namespace the driver uses for itself.
NAMESPACE = "dinov3_ray"

_PREFIX = "dinov3"
_AUTH_MODE = "RAY_AUTH_MODE"
# Results leave the store as soon as their tensors are gone, and not within Ray's usual second: otherwise a pool that
# delivers 1 GB per second holds another one, and keeps writing to pages that its processes have not touched yet. (On
# 2 CPUs, four simulated accelerators, the first 300 batches: 91% of the ideal in place of 72%.)
_SYSTEM_CONFIG = {"free_objects_period_milliseconds": 100}


@dataclass(slots=True)
class Runtime:
    """This process's connection to Ray; ``owned`` if it was started or joined by :func:`connect`."""

    address: str
    owned: bool
    auth_mode_before: str | None = None

    def close(self) -> None:
        """End the connection, and the Ray that came with it, if it is ours."""
        if not self.owned or not ray.is_initialized():
            return
        ray.shutdown()
        # ray.init() turns token authentication on by setting this for the whole process, and leaves it set.
        if self.auth_mode_before is None:
            os.environ.pop(_AUTH_MODE, None)
        else:
            os.environ[_AUTH_MODE] = self.auth_mode_before


class _Fork:
    """Whether this process was forked from one that was connected to Ray, where every call to Ray hangs."""

    happened = False

    @classmethod
    def note(cls) -> None:
        cls.happened = cls.happened or ray.is_initialized()


# At import, since there is no other moment: a forked DataLoader worker runs none of our code before it needs to know.
os.register_at_fork(after_in_child=_Fork.note)


def connect(address: str | None = None, *, may_start: bool = False, **start_options: Any) -> Runtime:
    """Use the Ray that this process is connected to; else join ``address`` or RAY_ADDRESS; else start one.

    Args:
        address: ``host:port`` of a running Ray's head, or ``auto``.
        may_start: whether to start a Ray of this process's own if none is named.
        start_options: further arguments of ``ray.init`` for a Ray that is started here.

    Raises:
        PoolError: if the cluster cannot be reached, or this process is connected to another one.
    """
    if _Fork.happened:
        raise ForkedProcessError(
            f"process {os.getpid()} was forked from one that is connected to Ray, where Ray would hang: keep the "
            "teacher out of forked DataLoader workers (wrap the loader in teacher.prefetch(...) in the trainer's "
            "process), or start workers with multiprocessing_context='spawn'"
        )
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", here):
            raise PoolError(
                f"address is {address}, but this process is connected to the Ray at {here}: disconnect first"
            )
        return Runtime(here, owned=False)
    before = os.environ.get(_AUTH_MODE)
    address = address or os.environ.get("RAY_ADDRESS") or None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if address is None and not may_start:
        raise PoolError(
            "this process is not connected to Ray, and no address is given: pass address='host:port', set RAY_ADDRESS, "
            "or call ray.init() first"
        )
    if address is None:
        # "local": without an address, Ray would follow a file in /tmp to a cluster that may be long gone.
        options |= {"address": "local", "include_dashboard": False, "_system_config": _SYSTEM_CONFIG, **start_options}
    else:
        obstacle = find_obstacle(address)
        if obstacle is not None:
            raise PoolError(f"{obstacle.message}. Remedy: {obstacle.remedy}")
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PoolError(
            f"cannot reach Ray at {address or 'a new local instance'}: {error}. Is it running, and does this process "
            "have its token (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH)?"
        ) from error
    return Runtime(ray.get_runtime_context().gcs_address, owned=True, auth_mode_before=before)


def check_name(name: str) -> str:
    """``name`` if it can name a pool.

    Raises:
        ConfigError: if it is not letters, digits, dots, dashes and underscores.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        raise ConfigError(f"name must be 1 to 100 letters, digits, '.', '_' or '-'; got {name!r}")
    return name


def controller_name(pool: str) -> str:
    return f"{_PREFIX}/{pool}"


def replica_name(pool: str, replica_id: str) -> str:
    return f"{_PREFIX}/{pool}/{replica_id}"


def list_pools(namespace: str = NAMESPACE) -> list[str]:
    """The names of the pools in ``namespace``."""
    names = (name.split("/") for name in _actor_names(namespace))
    return sorted(parts[1] for parts in names if len(parts) == 2 and parts[0] == _PREFIX)


def find_controller(name: str, namespace: str) -> Any:
    """The controller actor of a pool in the Ray that this process is connected to.

    Raises:
        PoolNotFoundError: with the names of the pools that there are.
    """
    try:
        return ray.get_actor(controller_name(name), namespace=namespace)
    except ValueError as error:
        others = list_pools(namespace)
        there = f"running there: {', '.join(map(repr, others))}" if others else "no pool is running there"
        raise PoolNotFoundError(
            f"no pool named {name!r} in namespace {namespace!r} of the Ray at "
            f"{ray.get_runtime_context().gcs_address}; {there}"
        ) from error


def list_actors(namespace: str, pool: str) -> list[tuple[str, Any]]:
    """(replica id, actor handle) of each replica of ``pool`` that is alive or starting, as far as Ray knows."""
    prefix = replica_name(pool, "")
    found = []
    for name in _actor_names(namespace):
        if name.startswith(prefix):
            try:
                found.append((name.removeprefix(prefix), ray.get_actor(name, namespace=namespace)))
            except ValueError:
                continue  # it ended between the two calls
    return found


def _actor_names(namespace: str) -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == namespace]


def process_start(pid: int) -> str:
    """When process ``pid`` of this machine began, in clock ticks since boot (field 22 of its stat file); "" if unknown.

    A process number may be given to another process later; number and start together name one process for good.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


@ray.remote(num_cpus=0, max_retries=0)
def kill_process(pid: int, started: str) -> bool:
    """Kill process ``pid`` of the node this runs on, if it is still the one that began at ``started``."""
    if not started or process_start(pid) != started:
        return False
    os.kill(pid, signal.SIGKILL)
    return True
