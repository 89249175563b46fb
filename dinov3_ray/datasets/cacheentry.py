"""One entry of the cache as bytes, and the figures that a cache gives of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save

from dinov3_ray.features import Features

__all__ = ["CacheStatistics", "pack", "unpack"]


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot of one process's use of a cache, and of the size of what all processes put there.

    Attributes:
        hits, misses: images looked up.
        written, evicted: entries.
        dropped: entries not written, since the queue was full, the disk failed or they exceed the bound.
        torn: entries found damaged or belonging to another key; counted as misses too.
        read_bytes, written_bytes: of features.
        read_seconds, written_seconds: spent on them, so that the MB/s are those of the disk and the database.
        entries, size: of the database, in entries and bytes of its file that are in use.
        trouble: the last failure of the disk or the database, in words.
    """

    hits: int = 0
    misses: int = 0
    written: int = 0
    evicted: int = 0
    dropped: int = 0
    torn: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    read_seconds: float = 0.0
    written_seconds: float = 0.0
    entries: int = 0
    size: int = 0
    trouble: str | None = None

    @property
    def hit_rate(self) -> float:
        """Of the images looked up; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def read_mb_s(self) -> float:
        return self.read_bytes / 1e6 / self.read_seconds if self.read_seconds else 0.0

    @property
    def written_mb_s(self) -> float:
        return self.written_bytes / 1e6 / self.written_seconds if self.written_seconds else 0.0


def pack(features: Features) -> bytes:
    """``features`` as the bytes of a safetensors file."""
    named = {name: tensor.cpu().contiguous() for name, tensor in features.named()}
    # safetensors orders tensors by its own rule; the order of the layers is the spec's.
    return save(named, {"fingerprint": json.dumps(features.fingerprint), "names": json.dumps(list(named))})


def unpack(value: bytes) -> Features | None:
    """The reverse of :func:`pack`, on the CPU; None if the bytes are not of that form."""
    try:
        # The header's length, then the header: safetensors' own reader of bytes does not give its metadata.
        metadata = json.loads(value[8 : 8 + int.from_bytes(value[:8], "little")])["__metadata__"]
        tensors = load(value)
        named = {name: tensors[name] for name in json.loads(metadata["names"])}
        return Features.from_named(named, json.loads(metadata["fingerprint"]))
    except (SafetensorError, ValueError, KeyError):
        return None
