"""Where a pool is to be found: among this process's own local pools, or in Ray."""

from __future__ import annotations

import threading
from typing import Any

import ray

from dinov3_ray.errors import PoolExistsError, PoolNotFoundError
from dinov3_ray.pool.cluster import connect, controller_name, list_pools
from dinov3_ray.pool.local import LocalController, LocalTransport
from dinov3_ray.pool.ray_transport import RayTransport
from dinov3_ray.pool.transport import Transport

__all__ = ["find_controller", "local_pool", "open_transport", "register_local", "unregister_local"]

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


def open_transport(name: str, namespace: str, address: str | None) -> tuple[Transport, str | None]:
    """A way to the pool, and the address under which another process finds it (None: nowhere but here)."""
    local = local_pool(name) if address is None else None
    if local is not None:
        return LocalTransport(local), None
    runtime = connect(address)
    return RayTransport(find_controller(name, namespace), namespace, name), runtime.address
