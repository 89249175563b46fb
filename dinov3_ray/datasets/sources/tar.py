"""WebDataset: tar shards whose members share a key up to the first dot of their names."""

from __future__ import annotations

import logging
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dinov3_ray.datasets.decode import Unreadable
from dinov3_ray.datasets.formats import has_image_name
from dinov3_ray.datasets.sources.source import (
    Content,
    check_unique,
    is_hidden,
    listing,
    read_whole,
    tell_left_out,
)

__all__ = ["TarSource"]

logger = logging.getLogger("dinov3_ray")

_NO_IMAGE, _DAMAGED, _DANGLING = -1, -2, -3  # in place of a size
_SLICE = 32


@dataclass(frozen=True)
class TarSource:
    """Images in uncompressed tar shards; the id is the sample's key.

    Members whose names begin with a dot, and samples without an image in folders without one, as those of labels, are
    left out; a sample without an image in a folder that has some is an error.

    Where a key occurs in several shards, ids are ``shard/key``. A sample with several images has an id
    ``key.extension`` for each. Members are listed once, and then read by their offsets: a block costs its own bytes
    only, wherever in a shard it lies.
    """

    system: Any
    root: str
    name: str
    files: tuple[str, ...]
    by_file: bool = True

    def describe(self) -> dict[str, Any]:
        return {"kind": "webdataset", "path": self.name, "root": self.root}

    def rows(self) -> pa.Table:
        rows: list[tuple[str, str, int, int]] = []
        bare: dict[tuple[str, str], list[str]] = {}
        for file in self.files:
            members, names = self._members(file)
            rows += members
            bare |= {(key, file): others for key, others in names.items()}
        with_images = {_folder_of(row[0]) for row in rows if row[3] not in (_NO_IMAGE, _DAMAGED)}
        left = {key for key in bare if _folder_of(key[0]) not in with_images}
        tell_left_out(self.name, [name for key in left for name in bare[key]])
        rows = [row for row in rows if row[3] != _NO_IMAGE or row[:2] not in left]
        anew = len({row[0] for row in rows}) < len(rows)
        if anew:
            rows = [(f"{file.removesuffix('.tar')}/{id_}", file, start, size) for id_, file, start, size in rows]
        check_unique([row[0] for row in rows], "within a shard, keys must differ")
        if anew:
            logger.warning("%s: keys start anew in some shards; ids are shard/key, such as %r", self.name, rows[0][0])
        return listing(iter(rows))

    def slices(self, rows: pa.Table) -> list[pa.Table]:
        return [rows.slice(start, _SLICE) for start in range(0, len(rows), _SLICE)]

    def read(self, rows: pa.Table) -> Iterator[tuple[str, Content]]:
        for row in rows.to_pylist():
            path = f"{self.root}/{row['file']}"
            if row["size"] == _NO_IMAGE:
                yield row["id"], Unreadable("missing", f"the sample in {row['file']} has no member that is an image")
            elif row["size"] == _DANGLING:
                yield row["id"], Unreadable("missing", f"a link in {row['file']} to a member that is not there")
            elif row["size"] == _DAMAGED:
                yield row["id"], Unreadable("truncated", f"the shard is damaged from byte {row['offset']} on")
            else:
                data = read_whole(self.system, path, row["offset"], row["size"])
                if isinstance(data, bytes) and len(data) < row["size"]:
                    data = Unreadable("truncated", f"{row['file']} ends within this member")
                yield row["id"], data

    def _members(self, file: str) -> tuple[list[tuple[str, str, int, int]], dict[str, list[str]]]:
        """The rows of a shard, and the names of the members of each sample that has no image."""
        samples: dict[str, list[tuple[str, str]]] = {}  # by key: extension, and the member that has the content
        places: dict[str, tuple[int, int]] = {}
        damaged = None
        with self.system.open_input_file(f"{self.root}/{file}") as stream:
            try:
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    for member in archive:
                        folder, _, name = member.name.rpartition("/")
                        stem, _, extension = name.partition(".")
                        key = f"{folder}/{stem}" if folder else stem
                        content = posixpath.normpath(member.name)
                        if member.isfile():
                            places[content] = member.offset_data, member.size
                        elif member.islnk():  # tar packs a file with several names in this way
                            content = posixpath.normpath(member.linkname)
                        elif member.issym():
                            content = posixpath.normpath(posixpath.join(folder, member.linkname))
                        else:
                            continue
                        if is_hidden(member.name):
                            continue  # a link may lead to it all the same
                        samples.setdefault(key, []).append((extension, content))
                    if not _ends(stream, archive.offset):
                        damaged = archive.offset
            except tarfile.TarError:
                damaged = stream.tell()
        rows: list[tuple[str, str, int, int]] = []
        bare: dict[str, list[str]] = {}
        for key, members in samples.items():
            images = [member for member in members if has_image_name(member[0])]
            for extension, content in images:
                place = places.get(content, (0, _DANGLING))
                rows.append((key if len(images) == 1 else f"{key}.{extension}", file, *place))
            if not images:
                rows.append((key, file, 0, _NO_IMAGE))
                bare[key] = [f"{key}.{extension}" if extension else key for extension, _ in members]
        if damaged is not None:
            rows.append((file, file, damaged, _DAMAGED))
        return rows, bare


def _folder_of(key: str) -> str:
    return posixpath.dirname(posixpath.normpath(key))


def _ends(stream: Any, offset: int) -> bool:
    """Whether an archive that is read up to ``offset`` ends there, with a block of zeros and nothing else after it.

    ``tarfile`` takes the first damaged header for the end, and says nothing.
    """
    stream.seek(offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        return False
    while rest := stream.read(tarfile.RECORDSIZE):
        if any(rest):
            return False
    return True
