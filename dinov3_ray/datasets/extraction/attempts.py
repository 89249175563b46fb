"""Counts the processes that were to compute a block, in the key-value store of Ray's head, which outlives them all.

Ray Data starts a worker again whenever its process ends, and does its blocks again. A block that ends each of them, as
where it takes more memory than there is, would never be finished, and nobody would be told why.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

# A private interface of Ray, seen in 2.60.0 and unchanged since Ray 1; pool/kv.py stands on it too.
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from dinov3_ray.errors import StoreError

__all__ = ["MEMORY_REMEDY", "Attempts"]

MEMORY_REMEDY = (
    "if memory ran out on its node, run the same command with a smaller batch_size (--batch-size), fewer decoders or "
    "fewer replicas; finished blocks stay"
)
_NAMESPACE = b"dinov3_ray"


@dataclass(frozen=True)
class Attempts:
    """Those of one run; picklable.

    Attributes:
        most: for each block.
    """

    most: int
    _run: str = field(default_factory=lambda: uuid.uuid4().hex)

    def begin(self, block: str) -> None:
        """One more process begins ``block``.

        Raises:
            StoreError: as many as there may be have begun it, and none has finished it.
        """
        key = self._key(block)
        before = int(_internal_kv_get(key, namespace=_NAMESPACE) or 0)
        if before >= self.most:
            raise StoreError(
                f"block {block} must be finished by one of {self.most} processes; each has ended before it was done "
                f"({MEMORY_REMEDY})"
            )
        _internal_kv_put(key, str(before + 1).encode(), overwrite=True, namespace=_NAMESPACE)

    def end(self, block: str) -> None:
        """``block`` is finished, or has failed for a reason that is known."""
        _internal_kv_del(self._key(block), namespace=_NAMESPACE)

    def _key(self, block: str) -> bytes:
        return f"extraction/{self._run}/{block}".encode()
