"""One file of a store: its rows are mapped where they can be, and decoded where they cannot."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov3_ray.datasets.folder import PARTS, Folder
from dinov3_ray.datasets.store.pages import unnest
from dinov3_ray.datasets.store.schema import SCALE, Column
from dinov3_ray.errors import StoreError

__all__ = ["INDEX_COLUMNS", "Part"]

INDEX_COLUMNS = ["id", "height", "width", "view"]
"""Of a part: what it has of each image besides its features."""


@dataclass(eq=False)
class Part:
    """One Parquet file, opened when it is first read. May be pickled, and used from several threads.

    Attributes:
        count: of its rows.
        columns: the tensors of its rows.
    """

    folder: Folder
    file: str
    count: int
    columns: dict[str, Column]

    def __post_init__(self) -> None:
        self.shapes = tuple((name, column.shape) for name, column in self.columns.items())
        self._map: np.ndarray | None = None
        self._row_bytes = {name: column.row_bytes for name, column in self.columns.items()}
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._parquet: pq.ParquetFile | None = None
        self._group: tuple[int, dict[str, np.ndarray]] = (-1, {})

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "file": self.file, "count": self.count, "columns": self.columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def copy_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a column [stop - start, ...], as a new, aligned array."""
        column = self.columns[name]
        out = np.empty((stop - start, *column.shape), column.dtype)
        self.copy_into(out, name, start, stop)
        return out

    def copy_into(self, out: np.ndarray, name: str, start: int, stop: int) -> None:
        """Fill ``out`` [stop - start, ...], contiguous, from rows of a column."""
        column = self.columns[name]
        if column.offset is None:
            out[:] = self._decoded(name, start, stop)
            return
        # Byte by byte, since a mapped column need not stand at a multiple of its item size.
        size = self._row_bytes[name]
        out.reshape(-1).view(np.uint8)[:] = self._bytes(column.offset + start * size, column.offset + stop * size)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a column, read-only, mapped where they can be."""
        column = self.columns[name]
        if column.offset is None:
            array = self._decoded(name, start, stop)
        else:
            size = self._row_bytes[name]
            raw = self._bytes(column.offset + start * size, column.offset + stop * size)
            array = raw.view(column.dtype).reshape(stop - start, *column.shape)
        array.flags.writeable = False
        return array

    def layout(self, result_dtype: str) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """The NumPy dtype of each output, and its shape per row, as :meth:`load` gives them; reads nothing."""
        wide = np.dtype("float32" if result_dtype == "bfloat16" else result_dtype)
        columns = ((name, column) for name, column in self.columns.items() if not name.endswith(SCALE))
        dtypes = ((name, np.dtype(column.dtype), column.shape) for name, column in columns)
        return {name: (wide if dtype == np.int8 else dtype, shape) for name, dtype, shape in dtypes}

    def row_bytes(self, result_dtype: str) -> int:
        """Of a row's outputs, as :meth:`load` gives them."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.layout(result_dtype).values())

    def load(self, result_dtype: str) -> dict[str, pa.Array | np.ndarray]:
        """All rows: ``id``, ``height`` and ``width`` as Arrow has them, and outputs [count, ...] as new arrays.

        Outputs have the values that the teacher gave: int8 ones are multiplied by their scales, and come in
        ``result_dtype``; bfloat16 comes as float32, which holds each of its values.
        """
        index = self.folder.read_table(f"{PARTS}/{self.file}", ["id", "height", "width"])
        found: dict[str, pa.Array | np.ndarray] = {name: index[name].combine_chunks() for name in index.column_names}
        for name in self.layout(result_dtype):
            values = self.copy_rows(name, 0, self.count)
            if values.dtype == np.int8:
                values = _descale(values, self.copy_rows(name + SCALE, 0, self.count), result_dtype)
            found[name] = values
        return found

    @property
    def path(self) -> str:
        """In the file system of its folder."""
        return self.folder.join(f"{PARTS}/{self.file}")

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        try:
            if not self.folder.is_local:
                with self.folder.system.open_input_file(self.path) as file:
                    found = np.frombuffer(file.read_at(stop - start, start), np.uint8)
            else:
                if self._map is None:
                    # Not Python's mmap, which keeps the file open: a store may have more parts than a process may open.
                    with pa.memory_map(self.path) as file:
                        self._map = np.frombuffer(file.read_buffer(), np.uint8)
                found = self._map[start:stop]
        except OSError as error:
            raise self._damage(error) from error
        if len(found) < stop - start:
            raise self._damage("the file ends early")
        return found

    def _damage(self, what: object) -> StoreError:
        return self.folder.damaged(f"{PARTS}/{self.file}", what)

    def _decoded(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a column that Parquet must decode.

        A row group's columns are decoded at once, and those of the last one are kept: the next call is for another of
        its columns, or for its next row.
        """
        try:
            with self._lock:
                return self._decode(name, start, stop)
        except (OSError, pa.ArrowException) as error:
            raise self._damage(error) from error

    def _decode(self, name: str, start: int, stop: int) -> np.ndarray:
        if self._parquet is None:
            local = self.folder.is_local
            source = self.path if local else self.folder.system.open_input_file(self.path)
            self._parquet = pq.ParquetFile(source, memory_map=local)
        group_rows = self._parquet.metadata.row_group(0).num_rows
        pieces = []
        for group in range(start // group_rows, (stop - 1) // group_rows + 1):
            if self._group[0] != group:
                names = [name for name, column in self.columns.items() if column.offset is None]
                table = self._parquet.read_row_group(group, columns=names, use_threads=False)
                arrays = {name: unnest(table[name], self.columns[name].shape) for name in names}
                self._group = group, arrays
            first = group * group_rows
            pieces.append(self._group[1][name][max(start - first, 0) : stop - first])
        return np.concatenate(pieces)


def _descale(values: np.ndarray, scale: np.ndarray, result_dtype: str) -> np.ndarray:
    """What torch makes of int8 values, bit for bit; without it, since its threads do not survive a fork."""
    products: np.ndarray = np.multiply(values, scale, dtype=np.float32)
    if result_dtype != "bfloat16":
        narrow: np.ndarray = products.astype(result_dtype, copy=False)
        return narrow
    bits = products.view(np.uint32)
    bits += 0x7FFF + (bits >> 16 & 1)  # to the nearest bfloat16, and of two that are as near, to the even one
    bits &= 0xFFFF0000
    return products
