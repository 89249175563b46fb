"""An export to WebDataset shards: tar files with the outputs of each image as ``.npy`` members."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov3_ray.datasets.exports.rows import StoreRows
from dinov3_ray.errors import StoreError

__all__ = ["ShardWriter"]


class ShardWriter:
    """Writes ``000000.tar``, ``000001.tar``, ...

    Each image has the members ``KEY.json`` (id, height, width), ``KEY.cls.npy``, ``KEY.feature_map.npy``, ... A key has
    no dot in its last part. So it is the image's id without its extension, as a shard of the images themselves has it,
    where all of these are keys, and unique; else the number of the row.
    """

    has_shards = True

    def __init__(self, folder: Path, rows: StoreRows, shard_size: int) -> None:
        self._folder = folder
        self._rows = rows
        self._shard_size = shard_size
        self._keys = _stems(rows.store.ids)
        # A header of 512 bytes for each member, that of .npy (128 bytes), and zeros up to a multiple of 512.
        self.row_overhead = 1024 + 1152 * len(rows.layouts[0].columns)

    def describe(self) -> dict[str, Any]:
        return {"keys": "number" if self._keys is None else "id", "shards": -(-len(self._rows) // self._shard_size)}

    def resume(self, done: int) -> int:
        """A shard that was cut is written anew, over it."""
        for start in range(0, done, self._shard_size):
            path = self._path(start)
            if not path.exists():
                raise StoreError(f"{path} is damaged: it is gone; delete {self._folder}, and start anew")
        return done

    def write(self, start: int, stop: int) -> None:
        with self._path(start).open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for place in range(start, stop):
                    self._add(archive, place)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Nothing is left to do."""

    def _path(self, start: int) -> Path:
        return self._folder / f"{start // self._shard_size:06}.tar"

    def _add(self, archive: tarfile.TarFile, place: int) -> None:
        store = self._rows.store
        id_ = store.ids[place]
        key = f"{place:09}" if self._keys is None else self._keys[place]
        height, width = store.original_size(id_)
        described = json.dumps({"id": id_, "height": height, "width": width}, ensure_ascii=False).encode()
        members = [("json", io.BytesIO(described))]
        for name, array in self._rows.read(place).items():
            content = io.BytesIO()
            np.save(content, array)
            members.append((f"{name}.npy", content))
        for extension, content in members:
            member = tarfile.TarInfo(f"{key}.{extension}")  # no time and no owner: the same store, the same bytes
            member.size = content.getbuffer().nbytes
            content.seek(0)
            archive.addfile(member, content)


def _stems(ids: Sequence[str]) -> list[str] | None:
    """The ids without their extensions; None if one of these is not a key, or two are the same."""
    stems = []
    for id_ in ids:
        folder, slash, name = id_.rpartition("/")
        stems.append(folder + slash + name.partition(".")[0] if name.count(".") < 2 else "")
    return stems if len(set(stems)) == len(ids) and all(map(_is_key, stems)) else None


def _is_key(stem: str) -> bool:
    parts = stem.split("/")
    return stem.isprintable() and not {"", ".", ".."} & set(parts)
