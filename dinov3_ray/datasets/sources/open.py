"""Opens a path, glob or URI as the source that it is, on any file system that pyarrow reaches."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from dinov3_ray.datasets import MAX_PIXELS
from dinov3_ray.datasets.decode import IMAGE_EXTENSIONS, Decoder
from dinov3_ray.datasets.folder import open_path
from dinov3_ray.datasets.sources.parquet import ParquetSource
from dinov3_ray.datasets.sources.source import IRREGULAR, FileSource, Source
from dinov3_ray.datasets.sources.tar import TarSource
from dinov3_ray.errors import ConfigError, StoreError

__all__ = ["SourceOptions", "check_there", "matches", "open_source", "reopen_source"]

_LOOKED_FOR = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """How the images of a source are found and decoded.

    Args:
        image_column, id_column: of Parquet files or a Ray Dataset; by default they are found among the usual names.
        filesystem: a pyarrow file system, for a source without a URI.
        max_pixels: images of more pixels are errors, taken for decompression bombs.
        background: RGB, 0 to 255, under transparent pixels.

    Raises:
        ConfigError: names the option, the rule and the value.
    """

    image_column: str | None = None
    id_column: str | None = None
    filesystem: Any = None
    max_pixels: int = MAX_PIXELS
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        for name in ("image_column", "id_column"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} must be the name of a column, or None; got {value!r}")
        self.decoder()

    def decoder(self) -> Decoder:
        """What makes pixels of encoded images."""
        return Decoder(self.max_pixels, background=self.background)

    @property
    def columns(self) -> dict[str, Any]:
        """What :func:`open_source` takes of them."""
        return {"filesystem": self.filesystem, "image_column": self.image_column, "id_column": self.id_column}


def open_source(
    source: str | os.PathLike[str],
    *,
    filesystem: Any = None,
    image_column: str | None = None,
    id_column: str | None = None,
    exclude: str | None = None,
) -> Source:
    """The source that a folder, a file or a glob (``*``, ``?``, ``[...]``, ``**``) is.

    If no file has an image's extension, and some are Parquet or tar, those are read; else each file is an image,
    whatever its name, so that nothing is passed over in silence. Files and folders whose names begin with a dot are
    left out.

    Args:
        exclude: a path below which nothing is listed: the output folder, should it lie within the source.

    Raises:
        StoreError: nothing is there, or the columns of a Parquet source cannot be found.
    """
    system, path = open_path(source, filesystem)
    path = path.rstrip("/") or "/"
    if exclude is not None and f"{path}/".startswith(exclude.rstrip("/") + "/"):
        raise StoreError(f"out must not contain the source's images; {exclude} holds {path}")
    root, infos = _find(system, path, exclude)
    if not infos:
        raise StoreError(f"source {os.fspath(source)!r} must hold images; no file is there")
    name = _name(source, path)
    extensions = [file.rpartition(".")[2].lower() for file, _ in infos]
    if not IMAGE_EXTENSIONS.intersection(extensions):
        if "parquet" in extensions and "tar" in extensions:
            raise StoreError(
                f"source must hold images in one form; {name!r} has both .parquet and .tar files: choose with a glob, "
                "such as FOLDER/*.tar"
            )
        parquet = [file for file, extension in zip(infos, extensions, strict=True) if extension == "parquet"]
        if parquet:
            return ParquetSource.open(system, root, name, parquet, image_column, id_column)
        packed = [file for file, _ in infos if file.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2"))]
        if packed:
            raise StoreError(
                f"source must hold uncompressed .tar shards, which can be read anywhere; got {packed[0]!r}"
            )
        tars = [file for file, extension in zip(infos, extensions, strict=True) if extension == "tar"]
        if tars:
            return TarSource(system, root, name, tuple(file for file, _ in tars))
    return FileSource(system, root, name, tuple(infos))


def reopen_source(
    described: Mapping[str, Any],
    source: str | os.PathLike[str],
    *,
    filesystem: Any = None,
    image_column: str | None = None,
    id_column: str | None = None,
) -> Source:
    """Reopen a source that ``describe`` described, to read more of its rows.

    Nothing is listed or opened here, so the source need not exist.

    ``source`` and the columns are those that are given now, so that its own description differs where they do.
    """
    system, path = open_path(source, filesystem)
    name, root = _name(source, path.rstrip("/") or "/"), described["root"]
    if described["kind"] == "files":
        return FileSource(system, root, name)
    if described["kind"] == "webdataset":
        return TarSource(system, root, name, ())
    columns = image_column or described["image_column"], id_column or described["id_column"]
    return ParquetSource(system, root, name, (), *columns)


def check_there(source: Source, rows: pa.Table) -> None:
    """Raise StoreError if none of ``rows``' files exists: an unmounted disk is not a set of missing images."""
    files = rows["file"].unique().to_pylist()[:_LOOKED_FOR]
    infos = source.system.get_file_info([f"{source.root}/{file}" for file in files])
    if all(info.type == pafs.FileType.NotFound for info in infos):
        raise StoreError(
            f"source must still hold the images that remain; none of the next {len(files)} files is there, such as "
            f"{source.root}/{files[0]}: is its disk mounted?"
        )


def matches(pattern: str, path: str) -> bool:
    """Whether ``path`` matches a glob in which ``*`` stays within a folder and ``**/`` crosses any number of them.

    Raises:
        StoreError: the glob has a range such as ``[z-a]``.
    """
    expression = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern):
        if token.startswith("[") and len(token) > 1:
            expression += token.replace("[!", "[^")
        else:
            expression += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
    try:
        return re.fullmatch(expression, path, flags=re.DOTALL) is not None
    except re.error as error:
        raise StoreError(f"source must be a glob whose brackets hold characters; got {pattern!r}: {error}") from error


def _name(source: str | os.PathLike[str], path: str) -> str:
    """What a run's identity calls the source: the URI, or the absolute path."""
    return os.fspath(source).rstrip("/") if "://" in os.fspath(source) else path


def _find(system: Any, path: str, exclude: str | None) -> tuple[str, list[tuple[str, int]]]:
    """The root, and the files below it with their sizes, sorted by path."""
    info = system.get_file_info(path)
    if info.type == pafs.FileType.File:
        folder, _, name = path.rpartition("/")
        return folder, [(name, info.size)]
    pattern = None
    if info.type == pafs.FileType.NotFound:
        parts = PurePosixPath(path).parts
        wild = next((index for index, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
        if wild is None:
            raise StoreError(f"source must exist; there is nothing at {path!r}")
        pattern = "/".join(parts[wild:])
        path = str(PurePosixPath(*parts[:wild]))
    infos = system.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    prefix = path.rstrip("/") + "/"
    files = []
    for info in infos:
        try:
            name = info.path.removeprefix(prefix)
        except UnicodeDecodeError as error:
            name = error.object.decode(errors="backslashreplace")
            raise StoreError(f"names of files must be UTF-8, since ids are made of them; rename {name!r}") from error
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        excluded = exclude is not None and f"{info.path}/".startswith(exclude.rstrip("/") + "/")
        if hidden or excluded:
            continue
        if info.type == pafs.FileType.Directory:
            if system.type_name == "local":
                _check_link(info.path)
        else:
            irregular = info.type == pafs.FileType.Unknown
            files.append((name, IRREGULAR if irregular else info.size or 0))
    return path.rstrip("/"), sorted(file for file in files if pattern is None or matches(pattern, file[0]))


def _check_link(folder: str) -> None:
    """Raise StoreError if ``folder`` is a link to one that holds it: its images would be listed again and again."""
    if os.path.islink(folder):
        target = os.path.realpath(folder)
        if f"{os.path.realpath(os.path.dirname(folder))}/".startswith(target.rstrip("/") + "/"):
            raise StoreError(f"source must not hold a link to a folder around it; {folder} leads to {target}")
