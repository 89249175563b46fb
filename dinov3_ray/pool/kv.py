"""Facts about a pool that outlive its processes, in the key-value store of Ray's head.

There are four: the pool's declaration, which a restarted controller reads; the process of each replica, which it must
know of one that does not answer; for a request whose replicas died, which replica began to compute it; and why a
replica's process has ended itself. The third distinguishes a request that kills its replicas from one that was only
queued there.
"""

from __future__ import annotations

import pickle
from typing import Any

# A private interface of Ray, seen in 2.60.0 and unchanged since Ray 1: nothing documented outlives an actor without a
# service.
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

__all__ = ["PoolKV"]


class PoolKV:
    """The facts about one pool."""

    def __init__(self, namespace: str, pool: str) -> None:
        self._namespace = b"dinov3_ray"
        self._prefix = f"{namespace}/{pool}"

    def save_declaration(self, declaration: Any) -> None:
        # The writer and the only reader are controllers of this package, inside the cluster's trust boundary.
        _internal_kv_put(self._key("declaration"), pickle.dumps(declaration), overwrite=True, namespace=self._namespace)

    def load_declaration(self) -> Any | None:
        data = _internal_kv_get(self._key("declaration"), namespace=self._namespace)
        return None if data is None else pickle.loads(data)  # noqa: S301 - see save_declaration

    def save_process(self, replica_id: str, process: Any) -> None:
        """Record that ``replica_id`` runs in ``process``, a :class:`~dinov3_ray.pool.replica.actor.ReplicaProcess`."""
        key = self._key(f"process/{replica_id}")
        _internal_kv_put(key, pickle.dumps(process), overwrite=True, namespace=self._namespace)

    def load_process(self, replica_id: str) -> Any | None:
        """The process of ``replica_id``; None if it has not begun, or the head does not answer."""
        data = self._read_of_lost(f"process/{replica_id}")
        return None if data is None else pickle.loads(data)  # noqa: S301 - see save_declaration

    def begin_suspect(self, replica_id: str, request_id: str) -> None:
        """Record that ``replica_id`` is about to compute ``request_id``."""
        key = self._key(f"suspect/{replica_id}")
        _internal_kv_put(key, request_id.encode(), overwrite=True, namespace=self._namespace)

    def was_computing(self, replica_id: str, request_id: str) -> bool:
        """Whether ``request_id`` is the last suspect that ``replica_id`` began."""
        data = _internal_kv_get(self._key(f"suspect/{replica_id}"), namespace=self._namespace)
        return data is not None and data.decode() == request_id

    def save_end(self, replica_id: str, reason: str) -> None:
        """Record why the process of ``replica_id`` is about to end itself."""
        _internal_kv_put(self._key(f"end/{replica_id}"), reason.encode(), overwrite=True, namespace=self._namespace)

    def load_end(self, replica_id: str) -> str | None:
        """Why the process of ``replica_id`` has ended itself; None if it has not, or the head does not answer."""
        data = self._read_of_lost(f"end/{replica_id}")
        return None if data is None else data.decode()

    def _read_of_lost(self, name: str) -> bytes | None:
        try:
            data: bytes | None = _internal_kv_get(self._key(name), namespace=self._namespace)
        except Exception:  # noqa: BLE001 - whatever Ray raises: that a replica is lost must be noticed all the same
            return None
        return data

    def clear(self) -> None:
        """Delete all facts about the pool."""
        _internal_kv_del(self._key(""), del_by_prefix=True, namespace=self._namespace)

    def _key(self, name: str) -> bytes:
        return f"{self._prefix}/{name}".encode()
