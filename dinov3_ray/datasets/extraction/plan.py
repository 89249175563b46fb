"""Plans a run: its blocks, its forecast, and whether it may resume an older run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import features

from dinov3_ray import __version__
from dinov3_ray.datasets.folder import Folder
from dinov3_ray.datasets.store.pages import LEVEL_BYTES
from dinov3_ray.datasets.store.schema import SCALE
from dinov3_ray.errors import StoreError

__all__ = [
    "Forecast",
    "batch_note",
    "batches_text",
    "block_size_for",
    "check_same_run",
    "cut_blocks",
    "free_bytes",
    "row_bytes",
    "size_text",
    "storage_note",
    "versions",
]


_BLOCK_BYTES = 2**25
_BLOCK_ROWS = 512
# May differ between the runs that fill a store; all else must be the same. These say how it was made, and not what is
# in it. Another batch size gives the same features but for their last bits, and so each part says its own.
_MAY_DIFFER = {"batch_size", "license", "origin", "versions"}


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will write.

    Attributes:
        images: in the source; None where only reading it would show that (a Ray Dataset that is not materialized).
        remaining: of these, in blocks that are not finished yet.
        row_bytes: an image's features; where output shapes depend on the image, those of the first.
        exact: whether each image takes ``row_bytes``.
        free: bytes on the output's disk; None where it has no bound that is known.
        note: what is worth knowing about what is stored.
    """

    images: int | None
    remaining: int | None
    row_bytes: int
    exact: bool
    free: int | None
    note: str = ""

    @property
    def bytes(self) -> int | None:
        """That remain to be written."""
        return None if self.remaining is None else self.remaining * self.row_bytes

    @property
    def fits(self) -> bool:
        """False only where it is known not to fit."""
        return self.bytes is None or self.free is None or self.bytes <= self.free

    def noting(self, note: str) -> Forecast:
        """With one more note."""
        return replace(self, note=". ".join(filter(None, (self.note, note))))

    def __str__(self) -> str:
        count = "an unknown number of" if self.images is None else f"{self.images:,}"
        text = f"{count} images, {'' if self.exact else 'about '}{size_text(self.row_bytes)} each"
        if self.bytes is not None:
            text += f", {size_text(self.bytes)} to write"
            if self.remaining != self.images:
                text += f" for the {self.remaining:,} that remain"
        if self.free is not None:
            text += f"; {size_text(self.free)} free on the disk"
        return f"{text}. {self.note}".rstrip(". ")


def size_text(count: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def row_bytes(outputs: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of one row of ``outputs`` (name to dtype and shape), with a little for its id and size."""
    total = 64.0
    for value in outputs.values():
        levels = LEVEL_BYTES if len(value["shape"]) > 1 else 0
        total += (np.dtype(value["dtype"]).itemsize + levels) * int(np.prod(value["shape"]))
    return int(total)


def batch_note(made: Mapping[int, int], batch_size: int) -> str:
    """What is worth saying of a store whose finished parts are ``made`` with other batch sizes than what remains.

    Args:
        made: parts by the batch size that they were made with.
    """
    if not made or set(made) == {batch_size}:
        return ""
    text = f"{batches_text(made)}; what remains is made with {batch_size}"
    return f"{text}. Features of different batch sizes may differ in their last bits"


def batches_text(made: Mapping[int, int]) -> str:
    """Parts by their batch size, in words: 12 parts were made with batch size 32, 4 with 8."""
    first, *others = sorted(made.items(), key=lambda item: (-item[1], item[0]))
    text = f"{first[1]:,} part{'s were' if first[1] != 1 else ' was'} made with batch size {first[0]}"
    return ", ".join([text, *(f"{parts:,} with {size}" for size, parts in others)])


def storage_note(result_dtype: str, outputs: Mapping[str, Mapping[str, Any]]) -> str:
    """What is worth saying about how values of ``result_dtype`` are stored."""
    if any(name.endswith(SCALE) for name in outputs):
        return "int8 with one float32 scale per token: a channel is off by at most 1/254 of its token's largest"
    if result_dtype == "bfloat16":
        return "Parquet has no bfloat16: stored as float32, exactly, at twice the size; dtype float16 halves it"
    return ""


def block_size_for(size: int, batch_size: int) -> int:
    """Images per block for rows of ``size`` bytes: whole batches, as many as stay within 32 MiB and 512 images.

    Small enough that the last block, written when nothing is left to compute, takes little time.
    """
    batches = min(_BLOCK_BYTES // size, _BLOCK_ROWS) // batch_size
    return max(1, batches) * batch_size


def cut_blocks(rows: pa.Table, block_size: int, *, by_file: bool) -> list[tuple[int, int]]:
    """(start, stop) of the blocks of ``rows``; none crosses a file where ``by_file``."""
    edges = [0, len(rows)]
    if by_file:
        codes = rows["file"].combine_chunks().dictionary_encode().indices.to_numpy()
        edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(rows)]
    blocks = []
    for low, high in pairwise(edges):
        blocks += [(start, min(start + block_size, high)) for start in range(low, high, block_size)]
    return blocks


def versions() -> dict[str, str]:
    """Of the libraries that have a say in the values."""
    others = ("torch", "transformers", "pyarrow", "pillow", "ray")
    found = {"dinov3-ray": __version__} | {name: version(name) for name in others}  # a checkout need not be installed
    return found | {"libjpeg-turbo": features.version("libjpeg_turbo") or "none"}  # which Pillow decodes JPEGs with


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of what differs between two runs' identities; a key is like ``spec.dtype``."""
    for key in sorted({*old, *new} - (_MAY_DIFFER if not prefix else set())):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after


def check_same_run(folder: Folder, old: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise StoreError unless ``old``, the identity of the run in ``folder``, is this one."""
    found = list(_differences(old, identity))
    if found:
        told = "; ".join(f"{key} is {after!r}, there it is {before!r}" for key, before, after in found)
        has_moved = {key for key, _, _ in found} <= {"source.path", "source.root"}
        moved = " (if the same files lie elsewhere now, source_moved=True or --source-moved goes on with them)"
        raise StoreError(
            f"{folder.path} holds features of another run, and cannot be resumed with this one: {told}. "
            "Repeat the former command, or choose another output folder"
            f"{moved if has_moved else ''}"
        )


def free_bytes(folder: Folder) -> int | None:
    """On the disk of the folder, or of where it will be; None for remote file systems."""
    if not folder.is_local:
        return None
    path = Path(folder.path)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
