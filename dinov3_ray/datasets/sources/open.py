"""Opens a path, glob or URI as the source that it is, on any file system that pyarrow reaches."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pyarrow import fs as pafs

from dinov3_ray.datasets.decode import Decoder
from dinov3_ray.datasets.folder import open_path
from dinov3_ray.datasets.formats import foreign_plugins, has_image_name
from dinov3_ray.datasets.limits import MAX_PIXELS
from dinov3_ray.datasets.sources.parquet import ParquetSource
from dinov3_ray.datasets.sources.source import (
    DANGLING,
    IRREGULAR,
    FileSource,
    Source,
    extension_of,
    is_hidden,
    tell_left_out,
)
from dinov3_ray.datasets.sources.tar import TarSource
from dinov3_ray.errors import ConfigError, StoreError

__all__ = ["SourceOptions", "find_root", "matches", "open_source", "source_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """How the images of a source are found and decoded.

    It checks itself: a pydantic model that callers construct would raise pydantic's errors, not this package's.

    Args:
        image_column, id_column: of Parquet files or a Ray Dataset; by default they are found among the usual names.
        filesystem: a pyarrow file system, for a source without a URI.
        max_pixels: images of more pixels are errors, taken for decompression bombs. Larger ones than Pillow's own limit
            may be allowed: each takes up to 7 bytes of memory per pixel while it is decoded.
        background: RGB, 0 to 255, under transparent pixels.
        shrink_to: encoded images are shrunk by 2, 4 or 8 as they are decoded, by the largest that leaves this many
            pixels to their shorter side: faster for images much larger than the teacher's input, but other pixels, and
            so other features. By default, all are decoded at their own size.

    Raises:
        ConfigError: names the option, the rule and the value.
    """

    image_column: str | None = None
    id_column: str | None = None
    filesystem: Any = None
    max_pixels: int = MAX_PIXELS
    background: tuple[int, int, int] = (255, 255, 255)
    shrink_to: int | None = None

    def __post_init__(self) -> None:
        for name in ("image_column", "id_column"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} must be the name of a column, or None; got {value!r}")
        self.decoder()

    def decoder(self) -> Decoder:
        """What makes pixels of encoded images, with the plug-ins that this process has registered with Pillow."""
        return Decoder(self.max_pixels, background=self.background, shrink_to=self.shrink_to, plugins=foreign_plugins())

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
    """The source that a folder, a file or a glob is.

    A glob has ``*``, ``?``, ``[...]``, ``**`` and ``{a,b}``; its extensions match in any case, its other names exactly.

    Where files have an image's extension, those are the images: labels, caches and whatever else lies beside them is
    left out and reported. Else, if some are Parquet or tar, those are read; else each file is an image, whatever its
    name. Of image files, tar files and Parquet files with a column of images, a source has one kind only.
    Files and folders whose names begin with a dot are left out.

    Args:
        exclude: a path below which nothing is listed: the output folder, should it lie within the source.

    Raises:
        StoreError: nothing is there, it holds images in several forms, or the columns of a Parquet source cannot be
            found.
    """
    system, path = open_path(source, filesystem)
    path = path.rstrip("/") or "/"
    if _is_within(path, exclude):
        raise StoreError(f"out must not contain the source's images; {exclude} holds {path}")
    root, infos = _find(system, path, exclude)
    if not infos:
        raise StoreError(f"source {os.fspath(source)!r} must hold images; no file is there")
    name = source_name(source, path)
    images = tuple(file for file in infos if has_image_name(file[0]))
    parquet, tars = ([file for file in infos if extension_of(file[0]) == form] for form in ("parquet", "tar"))
    packed = [file for file, _ in infos if file.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2"))]
    if images:
        parquet = [file for file in parquet if ParquetSource.may_hold_images(system, f"{root}/{file[0]}", image_column)]
    forms = {"image": images, ".parquet": parquet, ".tar": [*tars, *packed]}
    found = [form for form, files in forms.items() if files]
    if len(found) > 1:
        raise StoreError(
            f"source must hold images in one form; {name!r} has {'both ' if len(found) == 2 else ''}"
            f"{' and '.join(found)} files: choose with a glob, such as FOLDER/**/*"
            f"{found[-1] if not images else '.{jpg,png}'}"
        )
    if images:
        tell_left_out(name, [file for file, _ in infos if not has_image_name(file)])
        return FileSource(system, root, name, images)
    gone = [file for file, size in (*parquet, *tars) if size == DANGLING]
    if gone:
        raise StoreError(f"source must hold its files; {gone[0]!r} is a link that leads nowhere")
    if parquet:
        return ParquetSource.open(system, root, name, parquet, image_column, id_column)
    if packed:
        raise StoreError(f"source must hold uncompressed .tar shards, which can be read anywhere; got {packed[0]!r}")
    if tars:
        return TarSource(system, root, name, tuple(file for file, _ in tars))
    return FileSource(system, root, name, tuple(infos))


def matches(pattern: str, path: str) -> bool:
    """Whether ``path`` matches a glob in which ``*`` stays within a folder and ``**/`` crosses any number of them.

    ``{a,b}`` is either. What follows the last dot matches in any case.

    Raises:
        StoreError: the glob has a range such as ``[z-a]``.
    """
    parts = _choices(pattern)
    if len(parts) > 1:
        return any(matches(part, path) for part in parts)
    found = re.fullmatch(r"(.*)(\.(?:[^/.\[\]]|\[[^\]]+\])*)", pattern, flags=re.DOTALL)
    stem, extension = found.groups() if found else (pattern, "")
    try:
        expression = f"{_expression(stem)}(?i:{_expression(extension)})"
        return re.fullmatch(expression, path, flags=re.DOTALL) is not None
    except re.error as error:
        raise StoreError(f"source must be a glob whose brackets hold characters; got {pattern!r}: {error}") from error


def _choices(pattern: str) -> list[str]:
    """``pattern`` with its first, innermost ``{a,b}`` replaced by each of its choices; without one, itself alone."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    return [f"{pattern[: found.start()]}{choice}{pattern[found.end() :]}" for choice in found[1].split(",")]


def _expression(pattern: str) -> str:
    expression = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern):
        if token.startswith("[") and len(token) > 1:
            expression += token.replace("[!", "[^")
        else:
            expression += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
    return expression


def source_name(source: str | os.PathLike[str], path: str) -> str:
    """What a run's identity calls the source: the URI, or the absolute path."""
    return os.fspath(source).rstrip("/") if "://" in os.fspath(source) else path


def _find(system: Any, path: str, exclude: str | None) -> tuple[str, list[tuple[str, int]]]:
    """The root, and the files below it with their sizes, sorted by path."""
    path, pattern, name = find_root(system, path)
    if name is not None:
        return path, [(name, system.get_file_info(f"{path}/{name}").size)]
    prefix = path.rstrip("/") + "/"
    listed = _walk(path, exclude) if system.type_name == "local" else _select(system, path)
    files = []
    for full, size in listed:
        file = full.removeprefix(prefix)
        if (pattern is None or matches(pattern, file)) and not is_hidden(file) and not _is_within(full, exclude):
            files.append((file, size))
    return path.rstrip("/"), sorted(files)


def _select(system: Any, path: str) -> Iterator[tuple[str, int]]:
    """The files below a folder of any file system, and their sizes."""
    for info in system.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True)):
        try:
            name = info.path
        except UnicodeDecodeError as error:
            raise _misnamed(error.object) from error
        if info.type != pafs.FileType.Directory:
            yield name, IRREGULAR if info.type == pafs.FileType.Unknown else info.size or 0


def _walk(root: str, exclude: str | None) -> Iterator[tuple[str, int]]:
    """The files below a local folder, and their sizes; links are followed, and those that lead nowhere are DANGLING.

    pyarrow's own listing passes over such links, and follows links in a circle again and again.

    Raises:
        StoreError: a link leads to a folder around it, a name is not UTF-8, or a folder cannot be read.
    """
    stack: list[tuple[str, frozenset[str]]] = [(root, frozenset())]
    while stack:
        folder, around = stack.pop()
        real = os.path.realpath(folder)
        if real in around:
            raise StoreError(f"source must not hold a link to a folder around it; {folder} leads to {real}")
        try:
            with os.scandir(folder) as entries:
                held = list(entries)
        except FileNotFoundError:
            continue  # it went away since, or a glob begins with a folder that is not there
        except OSError as error:
            raise StoreError(f"source must be a folder that can be listed: {error}") from error
        for entry in held:
            if is_hidden(entry.name) or _is_within(entry.path, exclude):
                continue
            try:
                entry.path.encode()
            except UnicodeEncodeError as error:
                raise _misnamed(os.fsencode(entry.path)) from error
            try:
                status = entry.stat()
            except OSError:  # a link to nowhere or to itself, or a file that reading it will say more about
                yield entry.path, DANGLING if entry.is_symlink() else 0
                continue
            if stat.S_ISDIR(status.st_mode):
                stack.append((entry.path, around | {real}))
            else:
                yield entry.path, status.st_size if stat.S_ISREG(status.st_mode) else IRREGULAR


def _misnamed(path: bytes) -> StoreError:
    name = path.decode(errors="backslashreplace")
    return StoreError(f"names of files must be UTF-8, since ids are made of them; rename {name!r}")


def find_root(system: Any, path: str) -> tuple[str, str | None, str | None]:
    """(the folder that names are relative to, a glob below it, the one file in it) of a source's path.

    Raises:
        StoreError: nothing is there.
    """
    info = system.get_file_info(path)
    if info.type == pafs.FileType.File:
        folder, _, name = path.rpartition("/")
        return folder, None, name
    if info.type != pafs.FileType.NotFound:
        return path, None, None
    parts = PurePosixPath(path).parts
    # A folder that is there is itself, whatever brackets its name has.
    wild = next(
        (
            index
            for index, part in enumerate(parts)
            if re.search(r"[*?\[{]", part) and not _is_there(system, str(PurePosixPath(*parts[: index + 1])))
        ),
        None,
    )
    if wild is None:
        raise StoreError(f"source must exist; there is nothing at {path!r}")
    return str(PurePosixPath(*parts[:wild])), "/".join(parts[wild:]), None


def _is_there(system: Any, path: str) -> bool:
    return bool(system.get_file_info(path).type != pafs.FileType.NotFound)


def _is_within(path: str, folder: str | None) -> bool:
    return folder is not None and f"{path}/".startswith(folder.rstrip("/") + "/")
