"""Defines what every source of images does, and the simplest one: one image per file.

A source lists its images once, as a table of ``id``, ``file`` (relative to the root), ``offset`` and ``size``; from
then on, any rows of that table can be read anywhere, in any order. Nothing here imports torch.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dinov3_ray.datasets.decode import Unreadable
from dinov3_ray.datasets.folder import open_path
from dinov3_ray.errors import StoreError

__all__ = [
    "DANGLING",
    "IRREGULAR",
    "LISTING",
    "Beside",
    "Content",
    "FileSource",
    "Source",
    "check_unique",
    "content_of",
    "extension_of",
    "is_hidden",
    "key_of",
    "listing",
    "read_whole",
    "tell_left_out",
]

logger = logging.getLogger("dinov3_ray")

LISTING = pa.schema([("id", pa.string()), ("file", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])

Content = bytes | np.ndarray | Unreadable
"""What a source has of one image: encoded bytes, decoded pixels, or why it has neither."""


@dataclass(frozen=True, slots=True)
class Beside:
    """A folder whose rows name files.

    Attributes:
        system, path: a pyarrow file system, and the folder in it.
        moved: (old, new): the folder that lay around it, and where that lies now.
    """

    system: Any
    path: str
    moved: tuple[str, str] | None = None


IRREGULAR = -1
"""In place of a size: a pipe, a socket or a device, which might never end."""

DANGLING = -2
"""In place of a size: a link that led nowhere when it was listed."""

_SLICE = 32
#: Seconds before another attempt at a read that failed: networks recover.
PAUSES = 0.2, 0.8


class Source(Protocol):
    """Images that can be listed, and read row by row; picklable."""

    @property
    def system(self) -> Any:
        """The pyarrow file system that they are on."""
        ...

    @property
    def root(self) -> str:
        """The folder in it that names of files are relative to."""
        ...

    @property
    def by_file(self) -> bool:
        """Whether a file holds many images, so that blocks should not cross files."""
        ...

    def describe(self) -> dict[str, Any]:
        """What distinguishes this source from others, as plain JSON values."""
        ...

    def rows(self) -> pa.Table:
        """All images in a fixed order, of schema LISTING."""
        ...

    def slices(self, rows: pa.Table) -> list[pa.Table]:
        """``rows`` cut into pieces, each for one decoding task."""
        ...

    def read(self, rows: pa.Table) -> Iterator[tuple[str, Content]]:
        """The id and content of each of ``rows``, in order."""
        ...


@dataclass(frozen=True)
class FileSource:
    """One image per file; the id is the path relative to ``root``."""

    system: Any
    root: str
    name: str
    infos: tuple[tuple[str, int], ...] | None = None
    by_file: bool = False

    def describe(self) -> dict[str, Any]:
        return {"kind": "files", "path": self.name, "root": self.root}

    def rows(self) -> pa.Table:
        assert self.infos is not None
        return listing((file, file, 0, size) for file, size in self.infos)

    def slices(self, rows: pa.Table) -> list[pa.Table]:
        return [rows.slice(start, _SLICE) for start in range(0, len(rows), _SLICE)]

    def read(self, rows: pa.Table) -> Iterator[tuple[str, Content]]:
        for row in rows.to_pylist():
            if row["size"] == IRREGULAR:
                yield row["id"], Unreadable("not an image", "neither a file nor a folder: a pipe, a socket or a device")
            elif row["size"] == DANGLING:
                yield row["id"], Unreadable("missing", "a link that leads nowhere")
            else:
                yield row["id"], read_whole(self.system, f"{self.root}/{row['file']}")

    def __getstate__(self) -> dict[str, Any]:
        # Tasks get their rows; the listing stays with the driver.
        return {**self.__dict__, "infos": None}


def listing(rows: Iterator[tuple[str, str, int, int]]) -> pa.Table:
    """Rows of (id, file, offset, size) as a table."""
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, LISTING, strict=True)], LISTING)


def is_hidden(name: str) -> bool:
    """Whether a part of a path begins with a dot, as ``.git/x`` and macOS's ``._a.jpg``: such files are left out."""
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(name).parts)


def extension_of(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; the name itself without one."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def tell_left_out(source: str, names: Sequence[str]) -> None:
    """Say once which files beside images are skipped, by their extensions."""
    if names:
        counts = Counter(
            f".{extension_of(name)}" if "." in name.rpartition("/")[2] else "no extension" for name in names
        )
        text = ", ".join(f"{count:,} {extension}" for extension, count in counts.most_common(8))
        logger.warning(
            "of %s, images are read; left out are files whose names are not those of images: %s%s",
            source,
            text,
            ", ..." if len(counts) > 8 else "",
        )


def content_of(cell: Any, beside: Beside | None = None) -> Content:
    """What a cell of an image column has: encoded bytes, plain or as Hugging Face's ``{bytes, path}``, or pixels.

    Where a cell has a ``path`` alone, the file that it names is read: an absolute path, a URI, or one relative to the
    folder ``beside`` which the row lies.
    """
    if isinstance(cell, dict):
        file = cell.get("path")
        if cell.get("bytes") is None and isinstance(file, str) and file:
            return _read_named(file, beside)
        cell = cell.get("bytes")
    if cell is None:
        return Unreadable("missing", "the row has no image (null)")
    if isinstance(cell, (bytes, bytearray, memoryview)):
        return bytes(cell)
    if isinstance(cell, np.ndarray):
        return cell
    return Unreadable("unsupported", f"an image must be encoded bytes or pixels; the row has {type(cell).__name__}")


def _read_named(file: str, beside: Beside | None) -> bytes | Unreadable:
    places: list[tuple[Any, str]] = []
    if "://" in file or file.startswith("/"):
        if beside is not None and beside.moved is not None and file.startswith(f"{beside.moved[0]}/"):
            places.append((beside.system, beside.moved[1] + file.removeprefix(beside.moved[0])))
        try:
            places.append(open_path(file))
        except StoreError as error:
            return Unreadable("unsupported", f"the row has no bytes, but a path that cannot be opened: {error}")
    elif beside is not None:
        places.append((beside.system, f"{beside.path}/{file}"))
    else:
        return Unreadable("missing", f"the row has no bytes, and its path is relative to no known place: {file}")
    for system, path in places:
        data = read_whole(system, path)
        if not (isinstance(data, Unreadable) and data.kind == "missing"):
            return data
    looked = " and ".join(path for _, path in places)
    return Unreadable("missing", f"the row has no bytes, and its path {file!r} leads to nothing (looked at {looked})")


def key_of(cell: Any, column: str) -> str:
    """The id in a cell; raises StoreError if there is none."""
    if cell is None:
        raise StoreError(f"id_column must name a column with a key in each row; {column!r} has a row without (null)")
    return str(cell)


def read_whole(system: Any, path: str, offset: int = 0, size: int | None = None) -> bytes | Unreadable:
    """A file's bytes, or a part of them; tried again where the file system fails, since networks recover."""
    for pause in (*PAUSES, None):
        try:
            with system.open_input_file(path) as file:
                return bytes(file.read() if size is None else file.read_at(size, offset))
        except FileNotFoundError:
            return Unreadable("missing", f"{path} was listed, but is not there any more")
        except PermissionError as error:
            return Unreadable("io", str(error))
        except Exception as error:  # noqa: BLE001 - file systems other than pyarrow's own raise what they like
            if pause is None:
                what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                return Unreadable("io", f"{what} ({len(PAUSES) + 1} attempts)")
            time.sleep(pause)
    raise AssertionError("unreachable")


def check_unique(ids: Sequence[str], remedy: str) -> None:
    """Raise StoreError if an id occurs twice."""
    seen: set[str] = set()
    for id_ in ids:
        if id_ in seen:
            raise StoreError(f"ids must be unique in a source; {id_!r} occurs twice ({remedy})")
        seen.add(id_)
