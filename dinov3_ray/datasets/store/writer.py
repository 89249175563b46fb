"""Writes the features of a block, commits them to the ledger, and makes a finished store of the ledger."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov3_ray.datasets.decode import Unreadable
from dinov3_ray.datasets.folder import ERRORS, INDEX, LEDGER, MANIFEST, PARTS, Folder
from dinov3_ray.datasets.sources.source import check_unique
from dinov3_ray.datasets.store.reader import errors_table, index_table
from dinov3_ray.datasets.store.schema import Row, encode_part
from dinov3_ray.errors import StoreError

__all__ = ["BlockWriter", "check_rows", "count_batch_sizes", "finish", "is_finished"]


@dataclass
class BlockWriter:
    """Gathers the features of one block's images, in whatever order they come, and commits them at once.

    A block is finished when its ledger entry exists, which is written last; parts without one are overwritten by the
    next attempt. Not for several threads at a time.

    Attributes:
        identity: of the run; it is in the metadata of each part. Its ``batch_size`` is in the ledger too.
    """

    folder: Folder
    name: str
    identity: Mapping[str, Any]
    _columns: list[Mapping[str, np.ndarray]] = field(default_factory=list)
    _rows: dict[int, tuple[Row, int, int]] = field(default_factory=dict)
    _errors: dict[int, dict[str, str]] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)

    def add(self, positions: Sequence[int], rows: Sequence[Row], columns: Mapping[str, np.ndarray]) -> None:
        """The encoded features [len(rows), ...] of the images at ``positions`` in the block."""
        self._columns.append(columns)
        for index, (position, row) in enumerate(zip(positions, rows, strict=True)):
            self._rows[position] = row, len(self._columns) - 1, index

    def fail(self, position: int, id_: str, trouble: Unreadable) -> None:
        """The image at ``position`` has no features."""
        self._errors[position] = {"id": id_, **asdict(trouble)}

    def commit(self) -> dict[str, Any]:
        """Write the parts, then the ledger entry, which is returned."""
        by_shape: dict[tuple[Any, ...], list[int]] = {}
        for position in sorted(self._rows):
            columns = self._columns[self._rows[position][1]]
            shapes = tuple((name, array.shape[1:]) for name, array in columns.items())
            by_shape.setdefault(shapes, []).append(position)
        # The commonest shape first, which is the only one as a rule.
        groups = sorted(by_shape.values(), key=lambda positions: (-len(positions), positions[0]))
        parts = [self._write(number, positions) for number, positions in enumerate(groups)]
        entry = {
            "block": self.name,
            "rows": len(self._rows),
            "bytes": sum(part["bytes"] for part in parts),
            "seconds": round(time.monotonic() - self._started, 3),
            "parts": parts,
            "errors": [self._errors[position] for position in sorted(self._errors)],
        }
        self.folder.write_json(f"{LEDGER}/{self.name}.json", entry)
        return entry

    def _write(self, number: int, positions: Sequence[int]) -> dict[str, Any]:
        import torch  # here, since a store is finished without it

        from dinov3_ray.features import copy_row

        first = self._columns[self._rows[positions[0]][1]]
        columns = {name: np.empty((len(positions), *array.shape[1:]), array.dtype) for name, array in first.items()}
        for target, position in enumerate(positions):
            _, batch, index = self._rows[position]
            for name, array in columns.items():
                copy_row(torch.from_numpy(array[target]), torch.from_numpy(self._columns[batch][name][index]))
        rows = [self._rows[position][0] for position in positions]
        buffer, described = encode_part(rows, columns, self.identity)
        file = f"{self.name}.{number}.parquet" if number else f"{self.name}.parquet"
        self.folder.write(f"{PARTS}/{file}", buffer)
        described_json = {name: column.to_json() for name, column in described.items()}
        made = {"file": file, "rows": len(rows), "bytes": buffer.size, "batch_size": self.identity["batch_size"]}
        return {**made, "columns": described_json}


def is_finished(folder: Folder, name: str) -> bool:
    """Whether the block called ``name`` is in the ledger."""
    return folder.exists(f"{LEDGER}/{name}.json")


def count_batch_sizes(ledger: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """The number of parts by the batch size that they were made with."""
    return dict(sorted(Counter(part["batch_size"] for entry in ledger for part in entry["parts"]).items()))


def check_rows(folder: Folder, given: int, held: int) -> None:
    """Raise StoreError unless a Dataset of ``given`` rows is what a store of ``held`` rows and errors was made of."""
    if given != held:
        raise StoreError(
            f"the rows of a Dataset must be those that {folder.path} holds, each with an id of its own; it has {given} "
            f"and the folder {held}: extract another Dataset, or one with another id_column, into another folder"
        )


def finish(
    folder: Folder, identity: Mapping[str, Any], *, order: Sequence[str] | None = None, given: int | None = None
) -> dict[str, Any]:
    """Write the index, the errors and, last, the manifest of a run whose blocks are all in the ledger.

    Args:
        order: the blocks' names as their rows came; by default, as they sort.
        given: the number of rows that came.

    Raises:
        StoreError: ids are not unique, or ``given`` rows have become another number of rows and errors; or a part
            cannot be read.
    """
    ledger = folder.ledger()
    if order is not None:
        places = {name: place for place, name in enumerate(order)}
        ledger.sort(key=lambda entry: places.get(entry["block"], len(places)))
    files = [part["file"] for entry in ledger for part in entry["parts"]]
    errors = errors_table(ledger)
    index = index_table(folder, files)
    check_unique(
        [*index["id"].to_pylist(), *errors["id"].to_pylist()], "name another id_column, and extract into another folder"
    )
    if given is not None:
        check_rows(folder, given, len(index) + len(errors))
    kinds: dict[str, int] = {}
    for kind in errors["kind"].to_pylist():
        kinds[kind] = kinds.get(kind, 0) + 1
    for name, table in ((INDEX, index), (ERRORS, errors)):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        folder.write(name, sink.getvalue())
    manifest = {
        **{key: value for key, value in identity.items() if key != "batch_size"},
        "batch_sizes": {str(size): parts for size, parts in count_batch_sizes(ledger).items()},
        "rows": sum(entry["rows"] for entry in ledger),
        "errors": len(errors),
        "errors_by_kind": dict(sorted(kinds.items())),
        "bytes": sum(entry["bytes"] for entry in ledger),
        "blocks": [{key: entry[key] for key in ("block", "rows", "parts")} for entry in ledger],
    }
    folder.write_json(MANIFEST, manifest)
    return manifest
