"""Parquet files with a column of image bytes, plain or as Hugging Face's ``{bytes, path}``, where either may be null.

What a path names is read: an absolute one, a URI, or one that is relative to the Parquet file's folder.
"""

from __future__ import annotations

import posixpath
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov3_ray.datasets.decode import Unreadable
from dinov3_ray.datasets.sources.source import PAUSES, Beside, Content, check_unique, content_of, key_of, listing
from dinov3_ray.errors import StoreError

__all__ = ["ID_COLUMNS", "IMAGE_COLUMNS", "ROW_NUMBER", "ParquetSource"]

IMAGE_COLUMNS = ("image", "bytes", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "data", "content")
ID_COLUMNS = ("id", "key", "__key__", "image_id", "path", "file_name", "filename", "name")
ROW_NUMBER = "#row"
"""As an id column: ids are ``file#row``."""

_READ_ROWS = 16
_UNREADABLE = -1  # in place of a row group


@dataclass(frozen=True)
class ParquetSource:
    """Images in Parquet files; the id is the row's key, or ``file#row`` where there is none."""

    system: Any
    root: str
    name: str
    files: tuple[str, ...]
    image_column: str
    id_column: str
    by_file: bool = True
    #: The root that it had when it was listed, if it lies elsewhere now: absolute paths in its rows are of there.
    moved_from: str | None = None

    @classmethod
    def open(
        cls,
        system: Any,
        root: str,
        name: str,
        files: Sequence[tuple[str, int]],
        image_column: str | None,
        id_column: str | None,
    ) -> ParquetSource:
        """Tell the columns from the first file's schema; raises StoreError where that leaves a doubt."""
        try:
            with system.open_input_file(f"{root}/{files[0][0]}") as file:
                schema = pq.read_schema(file)
        except (pa.ArrowException, OSError) as error:
            raise StoreError(
                f"the first Parquet file of a source tells its columns, but {files[0][0]} cannot be opened: {error}"
            ) from error
        image = _choose_fitting(image_column, "image_column", schema, IMAGE_COLUMNS, _holds_bytes)
        if image is None:
            raise StoreError(f"image_column must name the column of image bytes; {files[0][0]} has {schema.names}")
        id_ = _choose_fitting(id_column, "id_column", schema, ID_COLUMNS, _holds_keys)
        return cls(system, root, name, tuple(file for file, _ in files), image, id_ or ROW_NUMBER)

    @staticmethod
    def may_hold_images(system: Any, path: str, image_column: str | None) -> bool:
        """Whether a Parquet file beside image files has images of its own; of a damaged one, nobody knows."""
        try:
            with system.open_input_file(path) as file:
                schema = pq.read_schema(file)
        except (pa.ArrowException, OSError):
            return True
        if image_column is not None:
            return image_column in schema.names
        return _choose_fitting(None, "image_column", schema, IMAGE_COLUMNS, _holds_bytes) is not None

    def describe(self) -> dict[str, Any]:
        columns = {"image_column": self.image_column, "id_column": self.id_column}
        moved = {} if self.moved_from is None else {"moved_from": self.moved_from}
        return {"kind": "parquet", "path": self.name, "root": self.root, **columns, **moved}

    def rows(self) -> pa.Table:
        rows = [row for file in self.files for row in self._rows(file)]
        check_unique([row[0] for row in rows], f"name another id_column, or {ROW_NUMBER!r} for file#row")
        return listing(iter(rows))

    def slices(self, rows: pa.Table) -> list[pa.Table]:
        """By row group, since reading a row costs those before it in its group."""
        groups = rows["size"].to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(rows)]
        return [rows.slice(start, stop - start) for start, stop in pairwise(cuts)]

    def read(self, rows: pa.Table) -> Iterator[tuple[str, Content]]:
        file = rows["file"][0].as_py()
        wanted = deque(zip(rows["offset"].to_pylist(), rows["id"].to_pylist(), strict=True))
        group, last = rows["size"][0].as_py(), wanted[-1][0]
        if group == _UNREADABLE:
            yield file, Unreadable("corrupt", f"{file} could not be opened as Parquet when it was listed")
            return
        for pause in (*PAUSES, None):
            try:
                for offset, content in self._contents(file, group, last):
                    if wanted and offset == wanted[0][0]:
                        yield wanted.popleft()[1], content
            except (pa.ArrowException, OSError) as error:
                gone = isinstance(error, FileNotFoundError)
                trouble = Unreadable("missing" if gone else "corrupt", f"{file}, row group {group}: {error}")
                if pause is None or gone or isinstance(error, pa.ArrowException):
                    break
            else:
                return
            time.sleep(pause)
        for _, id_ in wanted:
            yield id_, trouble

    def _contents(self, file: str, group: int, last: int) -> Iterator[tuple[int, Content]]:
        """(row in the file, content) of a row group's rows, up to ``last``."""
        with self.system.open_input_file(f"{self.root}/{file}") as stream:
            parquet = pq.ParquetFile(stream)
            moved = None if self.moved_from is None else _parting(self.moved_from, self.root)
            beside = Beside(self.system, f"{self.root}/{file}".rpartition("/")[0], moved)
            row = sum(parquet.metadata.row_group(before).num_rows for before in range(group))
            for batch in parquet.iter_batches(_READ_ROWS, row_groups=[group], columns=[self.image_column]):
                yield from ((row + index, content_of(cell.as_py(), beside)) for index, cell in enumerate(batch[0]))
                row += len(batch)
                if row > last:
                    return

    def _rows(self, file: str) -> Iterator[tuple[str, str, int, int]]:
        """(id, file, row in the file, row group): where others have a size, the row group."""
        with self.system.open_input_file(f"{self.root}/{file}") as stream:
            try:
                parquet = pq.ParquetFile(stream)
            except pa.ArrowException:  # damaged; where the file system fails, there is nothing to list yet
                yield file, file, 0, _UNREADABLE
                return
            for option, column in (("image_column", self.image_column), ("id_column", self.id_column)):
                if column not in (*parquet.schema_arrow.names, ROW_NUMBER):
                    raise StoreError(f"{option} must name a column of each file; {file} has no {column!r}")
            row = 0
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                if self.id_column == ROW_NUMBER:
                    ids = [f"{file}#{row + index}" for index in range(count)]
                else:
                    cells = parquet.read_row_group(group, [self.id_column])[0].to_pylist()
                    ids = [key_of(cell, self.id_column) for cell in cells]
                for index, id_ in enumerate(ids):
                    yield id_, file, row + index, group
                row += count


def _parting(old: str, new: str) -> tuple[str, str]:
    """Two paths without the last folders that they have in common: files beside these have moved with them."""
    while posixpath.basename(old) and posixpath.basename(old) == posixpath.basename(new):
        old, new = posixpath.dirname(old), posixpath.dirname(new)
    return old.rstrip("/"), new.rstrip("/")


def _choose_fitting(given: str | None, option: str, schema: Any, names: Sequence[str], fits: Any) -> str | None:
    if given == ROW_NUMBER and option == "id_column":
        return given
    if given is not None:
        if given not in schema.names or not fits(schema.field(given).type):
            raise StoreError(f"{option} must name a column that fits; got {given!r}, there are {schema.names}")
        return given
    candidates = [field.name for field in schema if fits(field.type)]
    named = [name for name in names if name in candidates]
    if named:
        return named[0]
    return candidates[0] if option == "image_column" and len(candidates) == 1 else None


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        if "bytes" not in fields:
            return False
        # Where all images are files beside it, their column has no type.
        only_paths = pa.types.is_null(fields["bytes"]) and "path" in fields
        return only_paths or _holds_bytes(fields["bytes"])
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_keys(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):  # as pandas writes categories
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))
