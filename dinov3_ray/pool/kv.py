"""A few small facts about a pool that outlive its processes, in the key-value store of Ray's head.

Two things are written: the pool's declaration (so that a restarted controller finds what it was told last), and the
request that a replica is about to compute although earlier replicas died with it (so that a batch that ends replica
after replica can be told from one that merely was nearby).
"""

from __future__ import annotations

import pickle
from typing import Any

# The store that Ray's own libraries keep their state in. It is not a documented interface, but the only one that
# outlives an actor without a service of its own; it has had this form since Ray 1.
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

__all__ = ["PoolKV"]


class PoolKV:
    """The facts of one pool."""

    def __init__(self, namespace: str, pool: str) -> None:
        self._namespace = b"dinov3_ray"
        self._prefix = f"{namespace}/{pool}"

    def save_declaration(self, declaration: Any) -> None:
        # The writer and the only reader are controllers of this package, inside the cluster's trust boundary.
        _internal_kv_put(self._key("declaration"), pickle.dumps(declaration), overwrite=True, namespace=self._namespace)

    def load_declaration(self) -> Any | None:
        data = _internal_kv_get(self._key("declaration"), namespace=self._namespace)
        return None if data is None else pickle.loads(data)  # noqa: S301 - see save_declaration

    def begin_suspect(self, replica_id: str, request_id: str) -> None:
        """Write down that ``replica_id`` is about to compute ``request_id``."""
        key = self._key(f"suspect/{replica_id}")
        _internal_kv_put(key, request_id.encode(), overwrite=True, namespace=self._namespace)

    def was_computing(self, replica_id: str, request_id: str) -> bool:
        """Whether ``request_id`` is the last suspect that ``replica_id`` began."""
        data = _internal_kv_get(self._key(f"suspect/{replica_id}"), namespace=self._namespace)
        return data is not None and data.decode() == request_id

    def clear(self) -> None:
        """Forget the pool."""
        _internal_kv_del(self._key(""), del_by_prefix=True, namespace=self._namespace)

    def _key(self, name: str) -> bytes:
        return f"{self._prefix}/{name}".encode()
