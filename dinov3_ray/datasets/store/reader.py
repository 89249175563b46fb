"""Features read back from a store, one image or many at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov3_ray.datasets.folder import ERRORS, INDEX, MANIFEST, PARTS, PLAN, Folder
from dinov3_ray.datasets.store.pages import unnest
from dinov3_ray.datasets.store.schema import Column, check_format, decode_columns, spec_of
from dinov3_ray.errors import StoreError
from dinov3_ray.feature_spec import FeatureSpec

if TYPE_CHECKING:
    from dinov3_ray.features import Features

__all__ = ["ERROR_SCHEMA", "FeatureStore", "errors_table", "index_table"]

ERROR_SCHEMA = pa.schema([("id", pa.string()), ("kind", pa.string()), ("detail", pa.string())])
_INDEX_COLUMNS = ["id", "height", "width", "view"]


class FeatureStore:
    """The teacher features of a data set, as :func:`extract` left them.

    Opening a store of any size costs only its index. A row of a local store is copied once, from the page cache into
    the tensors that are returned, which are the caller's own; :meth:`arrays` maps the files, and makes no copy at all.
    Remote stores are read by byte ranges. int8 columns of fewer than 256 values are decoded.

    Instances may be pickled, and used in forked or spawned DataLoader workers and from several threads.

    Args:
        out: the folder that ``extract`` wrote, as a path or a URI that pyarrow takes.
        filesystem: a pyarrow file system, for other places; ``out`` is then a path in it.
        partial: take what is finished of a run that was interrupted, or that is still going on.

    Raises:
        StoreError: ``out`` is not a feature store of this release's format, or its run is not finished.
    """

    def __init__(self, out: str | os.PathLike[str], *, filesystem: Any = None, partial: bool = False) -> None:
        self.folder = Folder.at(out, filesystem)
        """Where it is."""
        plan = self.folder.read_json(PLAN, "fingerprint", "spec", "result_dtype")
        check_format(self.folder.path, plan)
        self.complete = self.folder.exists(MANIFEST)
        if not self.complete and not partial:
            raise StoreError(
                f"the extraction into {self.folder.path} is not finished: run the same command again to go on with "
                "it, or pass partial=True to read what is there"
            )
        self.manifest: dict[str, Any] = self.folder.read_json(MANIFEST, "blocks", "rows") if self.complete else plan
        """fingerprint, spec, preprocessing, versions; counts once the run is finished."""
        self._parts = [
            _Part(self.folder, part["file"], {name: Column.from_json(value) for name, value in part["columns"].items()})
            for entry in self._ledger()
            for part in entry["parts"]
        ]
        index = self._read_index()
        self.ids: tuple[str, ...] = tuple(index["id"].to_pylist())
        """Of the rows: block by block in the source's order, and in a block by the shape of their outputs; in no order
        of blocks while the source is a Ray Dataset and its run not finished."""
        self._part = index["part"].to_numpy()
        self._row = index["row"].to_numpy()
        self._sizes = np.stack([index["height"].to_numpy(), index["width"].to_numpy()], axis=1)
        self._views = index["view"].to_pylist()
        self._places = {id_: place for place, id_ in enumerate(self.ids)}

    def _ledger(self) -> list[dict[str, Any]]:
        if self.complete:
            entries: list[dict[str, Any]] = self.manifest["blocks"]
            return entries
        return self.folder.ledger()

    def _read_index(self) -> pa.Table:
        if self.complete:
            return self.folder.read_table(INDEX)
        return index_table(self.folder, [part.file for part in self._parts])

    @property
    def fingerprint(self) -> str | None:
        """Of the teacher: which weights, configuration and preprocessing made the features."""
        value: str | None = self.manifest["fingerprint"]
        return value

    @property
    def spec(self) -> FeatureSpec:
        """What the teacher was asked for."""
        return spec_of(self.manifest["spec"])

    @property
    def errors(self) -> pa.Table:
        """The images that have no features: id, kind, detail."""
        if self.complete:
            return self.folder.read_table(ERRORS)
        return errors_table(self._ledger())

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, id_: object) -> bool:
        return id_ in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __getitem__(self, id_: str) -> Features:
        """The features of one image, B = 1, in the dtypes that the teacher's ``extract`` gives.

        Raises:
            StoreError: there is no such image; says so if it was unreadable.
        """
        place = self.place(id_)
        part, row = self._parts[self._part[place]], int(self._row[place])
        return self._decode({name: part.copy_rows(name, row, row + 1) for name in part.columns})

    def read(self, ids: Sequence[str]) -> Features:
        """The features of several images, B = len(ids), in this order.

        Raises:
            StoreError: one of them is missing, there are none, or their outputs differ in shape.
        """
        if isinstance(ids, str) or not len(ids):
            raise StoreError(f"ids must be a sequence of at least one id; got {ids!r}")
        places = [self.place(id_) for id_ in ids]
        shapes = {self._parts[self._part[place]].shapes for place in places}
        if len(shapes) != 1:
            raise StoreError(f"ids must name images whose outputs have one shape to share a batch; got {len(shapes)}")
        return self._read_places(np.asarray(places))

    def arrays(self, id_: str) -> dict[str, np.ndarray]:
        """What is stored of one image, [...] each, read-only; no copy where it is mapped.

        Names are those of the files' columns: ``cls``, ``feature_map``, ``registers``, ``layers_4``, ...; int8 values
        come with their scales, ``feature_map_scale``. Arrays on mapped memory may be unaligned (``flags.aligned``),
        which NumPy takes and torch does not.
        """
        place = self.place(id_)
        part, row = self._parts[self._part[place]], int(self._row[place])
        return {name: part.rows(name, row, row + 1)[0] for name in part.columns}

    def iter_batches(self, batch_size: int, *, drop_last: bool = False) -> Iterator[tuple[tuple[str, ...], Features]]:
        """All rows in order, as (ids, Features) of up to ``batch_size``.

        Where outputs differ in shape from row to row, a batch ends at the change.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise StoreError(f"batch_size must be an integer, at least 1; got {batch_size!r}")
        shapes = [part.shapes for part in self._parts]
        start = 0
        while start < len(self):
            stop = min(start + batch_size, len(self))
            shape = shapes[self._part[start]]
            others = (place for place in range(start, stop) if shapes[self._part[place]] != shape)
            stop = next(others, stop)
            if stop - start == batch_size or not drop_last:
                yield self.ids[start:stop], self._read_places(np.arange(start, stop))
            start = stop

    def place(self, id_: str) -> int:
        """The position of ``id_`` in :attr:`ids`; raises StoreError."""
        try:
            return self._places[id_]
        except (KeyError, TypeError):
            raise StoreError(self._why_missing(id_)) from None

    def original_size(self, id_: str) -> tuple[int, int]:
        """(height, width) of the image as it was decoded."""
        height, width = self._sizes[self.place(id_)]
        return int(height), int(width)

    def view(self, id_: str) -> bytes:
        """The digest of the decoded pixels (see :func:`dinov3_ray.datasets.decode.view_digest`)."""
        view: bytes = self._views[self.place(id_)]
        return view

    def views(self) -> Mapping[bytes, str]:
        """Digest to id; of images with the same pixels, the last."""
        return dict(zip(self._views, self.ids, strict=True))

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return f"FeatureStore({self.folder.path!r}, {len(self)} images, teacher {self.fingerprint}{state})"

    def _why_missing(self, id_: object) -> str:
        if not isinstance(id_, str):
            return f"an image's id must be a str (see FeatureStore.ids); got {id_!r}"
        for row in self.errors.to_pylist():
            if row["id"] == id_:
                return f"image {id_!r} has no features, since it could not be read ({row['kind']}): {row['detail']}"
        return f"the store {self.folder.path} has no image {id_!r}; its ids look like {self.ids[:1]}"

    def _decode(self, columns: Mapping[str, np.ndarray]) -> Features:
        return decode_columns(columns, self.manifest["result_dtype"], self.fingerprint)

    def _read_places(self, places: np.ndarray) -> Features:
        """Rows at ``places`` (one shape), copied run by run of rows that stand one after the other."""
        parts, rows = self._part[places], self._row[places]
        breaks = np.flatnonzero((np.diff(parts) != 0) | (np.diff(rows) != 1)) + 1
        runs = list(zip([0, *breaks], [*breaks, len(places)], strict=True))
        columns = {}
        for name, column in self._parts[parts[0]].columns.items():
            batch = np.empty((len(places), *column.shape), np.dtype(column.dtype))
            for start, stop in runs:
                first = int(rows[start])
                self._parts[parts[start]].copy_into(batch[start:stop], name, first, first + int(stop - start))
            columns[name] = batch
        return self._decode(columns)


@dataclass(eq=False)
class _Part:
    """One Parquet file, opened when it is first read."""

    folder: Folder
    file: str
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
        return {"folder": self.folder, "file": self.file, "columns": self.columns}

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

    @property
    def _path(self) -> str:
        return self.folder.join(f"{PARTS}/{self.file}")

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        try:
            if not self.folder.is_local:
                with self.folder.system.open_input_file(self._path) as file:
                    found = np.frombuffer(file.read_at(stop - start, start), np.uint8)
            else:
                if self._map is None:
                    # Not Python's mmap, which keeps the file open: a store may have more parts than a process may open.
                    with pa.memory_map(self._path) as file:
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
        with self._lock:
            if self._parquet is None:
                local = self.folder.is_local
                source = self._path if local else self.folder.system.open_input_file(self._path)
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


def index_table(folder: Folder, files: Sequence[str]) -> pa.Table:
    """id, height, width, view, part and row of every image, from the parts themselves."""
    tables = []
    for number, file in enumerate(files):
        table = folder.read_table(f"{PARTS}/{file}", _INDEX_COLUMNS)
        place = pa.array(np.full(len(table), number, np.int32)), pa.array(np.arange(len(table), dtype=np.int32))
        tables.append(table.append_column("part", place[0]).append_column("row", place[1]).replace_schema_metadata())
    if tables:
        return pa.concat_tables(tables).combine_chunks()
    fields = [("id", pa.string()), ("height", pa.int32()), ("width", pa.int32()), ("view", pa.binary(16))]
    return pa.schema([*fields, ("part", pa.int32()), ("row", pa.int32())]).empty_table()


def errors_table(ledger: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The errors of all blocks: id, kind, detail."""
    rows = [error for entry in ledger for error in entry["errors"]]
    return pa.Table.from_pylist(rows, schema=ERROR_SCHEMA)
