"""An export to ``.npy`` files, one per output, each [N, ...], with the ids of the rows beside them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dinov3_ray.datasets.exports.rows import Layout, StoreRows
from dinov3_ray.errors import StoreError

__all__ = ["NpyWriter"]


class NpyWriter:
    """Appends rows to files whose header names all of them from the beginning: ``np.load`` refuses one that is cut.

    A file grows by writes, not through a memory map, where a full disk would end the process (SIGBUS). Where outputs
    differ in shape from row to row, each shape has a folder of its own.
    """

    has_shards = False

    def __init__(self, folder: Path, rows: StoreRows, shard_size: int) -> None:  # noqa: ARG002 - as of other formats
        self._rows = rows
        self.row_overhead = 0
        several = len(rows.layouts) > 1
        self._parts = [
            (folder / f"part-{number}" if several else folder, layout) for number, layout in enumerate(rows.layouts)
        ]

    def describe(self) -> dict[str, Any]:
        return {
            "parts": [
                {
                    "folder": path.name if len(self._parts) > 1 else "",
                    "rows": len(layout.places),
                    "arrays": {
                        name: {"dtype": dtype.name, "shape": [len(layout.places), *shape]}
                        for name, (dtype, shape) in layout.columns.items()
                    },
                }
                for path, layout in self._parts
            ]
        }

    def resume(self, done: int) -> int:
        for folder, layout in self._parts:
            folder.mkdir(exist_ok=True)
            for path, header, size in _files(folder, layout):
                expected = len(header) + int(np.searchsorted(layout.places, done)) * size
                if not done:
                    path.write_bytes(header)
                elif not path.exists() or path.stat().st_size < expected:
                    raise StoreError(
                        f"{path} is damaged: it must have {expected} bytes; delete {folder}, and start anew"
                    )
                os.truncate(path, expected)
        return done

    def write(self, start: int, stop: int) -> None:
        for folder, layout in self._parts:
            first, last = np.searchsorted(layout.places, [start, stop])
            if first == last:
                continue
            with ExitStack() as stack:
                files = {path.stem: stack.enter_context(path.open("ab")) for path, _, _ in _files(folder, layout)}
                for place in layout.places[first:last].tolist():
                    for name, array in self._rows.read(place).items():
                        files[name].write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())

    def finish(self) -> None:
        store = self._rows.store
        for folder, layout in self._parts:
            ids = [store.ids[place] for place in layout.places.tolist()]
            (folder / "ids.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
            np.save(folder / "sizes.npy", np.array([store.original_size(id_) for id_ in ids], np.int32))


def _files(folder: Path, layout: Layout) -> Iterator[tuple[Path, bytes, int]]:
    """Each output's file, with its header, and the bytes of a row."""
    for name, (dtype, shape) in layout.columns.items():
        header = io.BytesIO()
        described = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (len(layout.places), *shape),
        }
        np.lib.format.write_array_header_1_0(header, described)
        yield folder / f"{name}.npy", header.getvalue(), dtype.itemsize * int(np.prod(shape))
