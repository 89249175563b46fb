"""Opens a source again whose images were listed before: where they were, or where they lie now.

What has moved is looked for below its new place, under the names that it had below the old one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from dinov3_ray.datasets.folder import open_path
from dinov3_ray.datasets.sources.open import find_root, source_name
from dinov3_ray.datasets.sources.parquet import ParquetSource
from dinov3_ray.datasets.sources.source import FileSource, Source
from dinov3_ray.datasets.sources.tar import TarSource
from dinov3_ray.errors import StoreError

__all__ = ["check_there", "names_below", "reopen_source"]

_LOOKED_FOR = 16


def reopen_source(
    described: Mapping[str, Any],
    source: str | os.PathLike[str],
    *,
    filesystem: Any = None,
    image_column: str | None = None,
    id_column: str | None = None,
    moved: bool = False,
) -> Source:
    """Reopen a source that ``describe`` described, to read more of its rows.

    Nothing is listed or opened here, so the source need not exist. Where it has ``moved``, its files are looked for
    below ``source`` (of a glob, below the folder that its names are relative to), under the names that they had.

    ``source`` and the columns are those that are given now, so that its own description differs where they do.

    Raises:
        StoreError: it has moved, and nothing is there.
    """
    system, path = open_path(source, filesystem)
    path = path.rstrip("/") or "/"
    name, root = source_name(source, path), find_root(system, path)[0] if moved else described["root"]
    if described["kind"] == "files":
        return FileSource(system, root, name)
    if described["kind"] == "webdataset":
        return TarSource(system, root, name, ())
    columns = image_column or described["image_column"], id_column or described["id_column"]
    moved_from = described.get("moved_from") or (described["root"] if moved else None)
    return ParquetSource(system, root, name, (), *columns, moved_from=moved_from)


def check_there(source: Source, rows: pa.Table, *, moved: bool = False, told: str = "") -> None:
    """Raise StoreError if none of ``rows``' files exists: an unmounted disk is not a set of missing images.

    Nor may those of a source that has ``moved`` be of another size than when they were listed.

    Args:
        told: what the error says of the files, in place of the usual words.
    """
    files = rows["file"].unique().to_pylist()[:_LOOKED_FOR]
    infos = source.system.get_file_info([f"{source.root}/{file}" for file in files])
    if files and all(info.type == pafs.FileType.NotFound for info in infos):
        told = told or "source must still hold the images that remain: is its disk mounted?"
        raise StoreError(f"{told} None of the next {len(files)} files is there, such as {source.root}/{files[0]}")
    if moved and isinstance(source, FileSource):
        listed = dict(zip(rows["file"].to_pylist(), rows["size"].to_pylist(), strict=True))
        for file, info in zip(files, infos, strict=True):
            if info.type == pafs.FileType.File and listed[file] >= 0 and info.size != listed[file]:
                raise StoreError(
                    f"a source that has moved must hold the same files; {source.root}/{file} has {info.size} bytes, "
                    f"and had {listed[file]}"
                )


def names_below(source: Source, paths: Sequence[str]) -> list[str]:
    """The names below ``source.root`` of files that were at ``paths``, of which nobody has said what they lay below.

    That is the folder which they have in common, or one around it: the first under which one of them is found.
    """
    folders = [path.split("/")[:-1] for path in paths]
    pairs = zip(min(folders, default=[]), max(folders, default=[]), strict=False)
    parts = [part for part, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    prefixes = ["/".join(parts[:count]) + "/" for count in range(len(parts), 0, -1)]
    if not parts or parts[0]:
        prefixes.insert(0, "")  # relative ones, as they are
    for prefix in prefixes:
        some = [f"{source.root}/{path.removeprefix(prefix)}" for path in paths[:_LOOKED_FOR]]
        if any(info.type == pafs.FileType.File for info in source.system.get_file_info(some)):
            break
    else:
        prefix = prefixes[0]
    return [path.removeprefix(prefix) for path in paths]
