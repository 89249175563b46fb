"""The output folder: its files, and how each is written whole or not at all.

::

    OUT/
      plan.json       what is extracted from what, by which teacher, under which rules
      plan.arrow      the images in order, one record batch per block (absent when the source is a Ray Dataset)
      parts/          000012.parquet: the features of one block; 000012.1.parquet: those of another output shape
      ledger/         000012.json: that block is finished; its parts, where their values lie, its errors
      index.parquet   id, part and row of every image      ┐
      errors.parquet  id, kind and detail of every failure ├ when all blocks are finished
      manifest.json   counts, and plan.json's identity     ┘
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from dinov3_ray.errors import StoreError
from dinov3_ray.machine import locks

__all__ = ["ERRORS", "INDEX", "LEDGER", "MANIFEST", "PARTS", "PLAN", "PLAN_ROWS", "Folder", "open_path"]

PLAN, PLAN_ROWS = "plan.json", "plan.arrow"
PARTS, LEDGER = "parts", "ledger"
INDEX, ERRORS, MANIFEST = "index.parquet", "errors.parquet", "manifest.json"

log = logging.getLogger("dinov3_ray")

_TEMPORARY = ".tmp-"
# An object appears in these only when its upload is complete, and "rename" would copy it.
_OBJECT_STORES = {"s3", "gcs", "abfs"}


def open_path(path: str | os.PathLike[str], filesystem: Any = None) -> tuple[Any, str]:
    """The pyarrow file system and the path within it of a local path or a URI (s3://, gs://, file://, ...).

    Raises:
        StoreError: no pyarrow file system takes the URI.
    """
    text = os.fspath(path)
    if filesystem is not None:
        if not isinstance(filesystem, pafs.FileSystem):
            raise StoreError(
                f"filesystem must be a pyarrow one; got {type(filesystem).__name__} (of fsspec, "
                "PyFileSystem(FSSpecHandler(filesystem)) makes one)"
            )
        return filesystem, text
    if "://" not in text:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    try:
        system, inner = pafs.FileSystem.from_uri(text)
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError or ImportError, as the scheme has it
        raise StoreError(f"no pyarrow file system takes {text!r}: {error}; pass filesystem=... for others") from error
    return system, inner


@dataclass(frozen=True)
class Folder:
    """A folder on a pyarrow file system."""

    system: Any
    path: str

    @classmethod
    def at(cls, path: str | os.PathLike[str], filesystem: Any = None) -> Folder:
        return cls(*open_path(path, filesystem))

    @property
    def is_local(self) -> bool:
        return bool(self.system.type_name == "local")

    def join(self, name: str) -> str:
        return str(PurePath(self.path, name)) if self.is_local else f"{self.path.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.system.get_file_info(self.join(name)).type != pafs.FileType.NotFound)

    def names(self, folder: str, suffix: str) -> list[str]:
        """The files in ``folder`` that end in ``suffix``, sorted; none if the folder does not exist."""
        infos = self.system.get_file_info(pafs.FileSelector(self.join(folder), allow_not_found=True))
        return sorted(info.base_name for info in infos if info.base_name.endswith(suffix))

    def make(self, name: str = "") -> None:
        self.system.create_dir(self.join(name) if name else self.path, recursive=True)

    def read(self, name: str) -> bytes:
        with self.system.open_input_file(self.join(name)) as file:
            return bytes(file.read())

    def read_json(self, name: str, *keys: str) -> Any:
        """An object that has these keys; raises StoreError where the file is missing or damaged."""
        try:
            value = json.loads(self.read(name))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(f"{self.path} is not a feature store: it has no {name}") from error
        except (OSError, ValueError) as error:
            raise self.damaged(name, error) from error
        if not isinstance(value, dict) or not value.keys() >= set(keys):
            raise self.damaged(name, f"it must be an object with {', '.join(keys)}")
        return value

    def ledger(self) -> list[dict[str, Any]]:
        """The entries of all finished blocks, in the order of their names."""
        keys = ("block", "rows", "bytes", "parts", "errors")
        return [self.read_json(f"{LEDGER}/{name}", *keys) for name in self.names(LEDGER, ".json")]

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file; raises StoreError where it is missing or damaged."""
        try:
            with self.system.open_input_file(self.join(name)) as file:
                return pq.read_table(file, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise self.damaged(name, error) from error

    def damaged(self, name: str, what: object) -> StoreError:
        """An error that says what is wrong with a file, and how to repair it."""
        kind, _, file = name.rpartition("/")
        remedy = "bring it back, or extract into another folder"
        if kind:
            entry = self.join(f"{LEDGER}/{file.partition('.')[0]}.json")
            remedy = (
                f"delete {entry} and {self.join(MANIFEST)}, and run the extraction again, which computes the block anew"
            )
        elif name in (INDEX, ERRORS, MANIFEST):
            remedy = f"delete {self.join(MANIFEST)}, and run the extraction again, which computes nothing that is there"
        return StoreError(f"{self.join(name)} is damaged, or cannot be read: {what}. Remedy: {remedy}")

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1).encode())

    def write(self, name: str, data: Any) -> None:
        """Make ``data`` (bytes or a pyarrow buffer) the content of ``name``: all of it or none, whatever happens.

        Locally, and where a file grows in sight of readers, it is written under a temporary name and renamed. Local
        files are synchronised to the disk first, so that a power cut cannot leave a ledger entry without its part.
        """
        path = self.join(name)
        if self.system.type_name in _OBJECT_STORES:
            with self.system.open_output_stream(path) as stream:
                stream.write(data)
            return
        temporary = f"{path}{_TEMPORARY}{uuid.uuid4().hex[:8]}"
        if self.is_local:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            return
        with self.system.open_output_stream(temporary) as stream:
            stream.write(data)
        self.system.move(temporary, path)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Make the folder, and hold it against other processes, if it is local.

        The lock is the kernel's, and ends with the process, however that ends. Where the file system has no locks, a
        warning says so.

        Raises:
            StoreError: another process holds it, or it cannot be made.
        """
        try:
            self.make()
        except OSError as error:
            raise StoreError(f"out must be a folder that can be written, or made; got {self.path}: {error}") from error
        if not self.is_local:
            yield
            return
        with open(self.join(".lock"), "w") as file:
            try:
                held = locks.hold(file)
            except OSError as error:
                if not locks.lacks_locks(error):
                    raise StoreError(f"{self.path} cannot be locked against other runs: {error}") from error
                held = True
                log.warning(
                    "%s is on a file system without locks (%s): see to it that no other run writes there meanwhile, or "
                    "mount it with them (Lustre: -o flock)",
                    self.path,
                    error.strerror,
                )
            if not held:
                raise StoreError(f"{self.path} is being written by another run: wait for it, or end it")
            yield

    def sweep(self, folder: str) -> int:
        """Delete what interrupted writes left in ``folder``; gives the number of files."""
        infos = self.system.get_file_info(pafs.FileSelector(self.join(folder), allow_not_found=True))
        left = [info.path for info in infos if _TEMPORARY in info.base_name]
        for path in left:
            # A worker that outlived its driver for a moment may have renamed it by now.
            with contextlib.suppress(FileNotFoundError):
                self.system.delete_file(path)
        return len(left)
