"""Facts about processes that outlive them, in the key-value store of Ray's head.

There are four about a pool: its declaration, which a restarted controller reads; the process of each replica, which it
must know of one that does not answer; for a request whose replicas died, which replica began to compute it; and why a
replica's process has ended itself. The third distinguishes a request that kills its replicas from one that was only
queued there.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

# A private interface of Ray, seen in 2.60.0 and unchanged since Ray 1: nothing documented outlives an actor without a
# service.
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

__all__ = ["HeadStore", "PoolKV"]

_NAMESPACE = b"dinov3_ray"


@dataclass(frozen=True)
class HeadStore:
    """The entries of the store whose names begin with ``prefix``; picklable."""

    prefix: str

    def put(self, name: str, value: bytes) -> None:
        _internal_kv_put(self._key(name), value, overwrite=True, namespace=_NAMESPACE)

    def get(self, name: str) -> bytes | None:
        value: bytes | None = _internal_kv_get(self._key(name), namespace=_NAMESPACE)
        return value

    def delete(self, name: str) -> None:
        _internal_kv_del(self._key(name), namespace=_NAMESPACE)

    def clear(self) -> None:
        """Delete all entries."""
        _internal_kv_del(self._key(""), del_by_prefix=True, namespace=_NAMESPACE)

    def _key(self, name: str) -> bytes:
        return f"{self.prefix}/{name}".encode()


class PoolKV:
    """The facts about one pool."""

    def __init__(self, namespace: str, pool: str) -> None:
        self._store = HeadStore(f"{namespace}/{pool}")

    def save_declaration(self, declaration: Any) -> None:
        # The writer and the only reader are controllers of this package, inside the cluster's trust boundary.
        self._store.put("declaration", pickle.dumps(declaration))

    def load_declaration(self) -> Any | None:
        data = self._store.get("declaration")
        return None if data is None else pickle.loads(data)  # noqa: S301 - see save_declaration

    def save_process(self, replica_id: str, process: Any) -> None:
        """Record that ``replica_id`` runs in ``process``, a :class:`~dinov3_ray.pool.replica.actor.ReplicaProcess`."""
        self._store.put(f"process/{replica_id}", pickle.dumps(process))

    def load_process(self, replica_id: str) -> Any | None:
        """The process of ``replica_id``; None if it has not begun, or the head does not answer."""
        data = self._read_of_lost(f"process/{replica_id}")
        return None if data is None else pickle.loads(data)  # noqa: S301 - see save_declaration

    def begin_suspect(self, replica_id: str, request_id: str) -> None:
        """Record that ``replica_id`` is about to compute ``request_id``."""
        self._store.put(f"suspect/{replica_id}", request_id.encode())

    def was_computing(self, replica_id: str, request_id: str) -> bool:
        """Whether ``request_id`` is the last suspect that ``replica_id`` began."""
        data = self._store.get(f"suspect/{replica_id}")
        return data is not None and data.decode() == request_id

    def save_end(self, replica_id: str, reason: str) -> None:
        """Record why the process of ``replica_id`` is about to end itself."""
        self._store.put(f"end/{replica_id}", reason.encode())

    def load_end(self, replica_id: str) -> str | None:
        """Why the process of ``replica_id`` has ended itself; None if it has not, or the head does not answer."""
        data = self._read_of_lost(f"end/{replica_id}")
        return None if data is None else data.decode()

    def _read_of_lost(self, name: str) -> bytes | None:
        try:
            return self._store.get(name)
        except Exception:  # noqa: BLE001 - whatever Ray raises: that a replica is lost must be noticed all the same
            return None

    def clear(self) -> None:
        """Delete all facts about the pool."""
        self._store.clear()
