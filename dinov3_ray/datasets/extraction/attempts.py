"""Counts the processes that were to compute a block, in the key-value store of Ray's head, which outlives them all.

Ray Data starts a worker again whenever its process ends, and does its blocks again. A block that ends each of them, as
where it takes more memory than there is, would never be finished, and nobody would be told why.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from dinov3_ray.errors import StoreError
from dinov3_ray.pool.kv import HeadStore

__all__ = ["MEMORY_REMEDY", "Attempts"]

MEMORY_REMEDY = (
    "if memory ran out on its node, run the same command with a smaller batch_size (--batch-size), fewer decoders or "
    "fewer replicas; finished blocks stay"
)


@dataclass(frozen=True)
class Attempts:
    """Those of one run; picklable.

    Attributes:
        most: for each block.
    """

    most: int
    _begun: HeadStore = field(default_factory=lambda: HeadStore(f"extraction/{uuid.uuid4().hex}"))

    def begin(self, block: str) -> None:
        """One more process begins ``block``.

        Raises:
            StoreError: as many as there may be have begun it, and none has finished it.
        """
        before = int(self._begun.get(block) or 0)
        if before >= self.most:
            raise StoreError(
                f"block {block} must be finished by one of {self.most} processes; each has ended before it was done "
                f"({MEMORY_REMEDY})"
            )
        self._begun.put(block, str(before + 1).encode())

    def end(self, block: str) -> None:
        """``block`` is finished, or has failed for a reason that is known."""
        self._begun.delete(block)
