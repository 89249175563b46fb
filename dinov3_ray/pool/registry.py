"""Where a pool is to be found: among this process's own local pools, or in Ray."""

from __future__ import annotations

import threading

from dinov3_ray.errors import PoolExistsError
from dinov3_ray.pool.cluster import connect, find_controller
from dinov3_ray.pool.local import LocalController, LocalTransport
from dinov3_ray.pool.ray_transport import RayTransport
from dinov3_ray.pool.transport import Transport

__all__ = ["local_pool", "open_transport", "register_local", "unregister_local"]

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
    """A way to the pool, and the address under which another process finds it (None: nowhere but here)."""
    local = local_pool(name) if address is None else None
    if local is not None:
        return LocalTransport(local), None
    runtime = connect(address)
    return RayTransport(find_controller(name, namespace), namespace, name), runtime.address
