"""Where an export goes: it grows in a folder beside its destination, which gets its name when all is there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3_ray.datasets.folder import Folder
from dinov3_ray.errors import StoreError

__all__ = ["MANIFEST_OF_EXPORT", "Destination"]

MANIFEST_OF_EXPORT = "export.json"

_LOCK = ".lock"
_IDENTITY = ("format", "to", "dtype", "shard_size", "store")
_KEYS = {"complete", "rows", *_IDENTITY}


@dataclass(frozen=True)
class Destination:
    """A local folder ``path``; until all is there, ``path.partial``.

    ``export.json`` says what an export is made from, and, until it is whole, how many rows of it are.
    """

    path: Path

    @classmethod
    def at(cls, dest: str | os.PathLike[str]) -> Destination:
        """Raises StoreError where no export can be."""
        text = os.fspath(dest)
        if "://" in text:
            raise StoreError(f"dest must be a local folder, from which others can copy it; got {text!r}")
        path = Path(os.path.realpath(os.path.expanduser(text)))
        if os.path.ismount(path):
            raise StoreError(f"dest must not be a mount point, but may be a folder in one; got {path}")
        if path == Path(os.path.realpath(os.getcwd())):  # which the finished folder would replace
            raise StoreError(f"dest must not be the working directory, but may be a folder in it; got {text!r}")
        found = cls(path)
        for folder in (found.path, found.partial):
            try:
                folder.lstat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise StoreError(f"dest must be where a folder can be made; got {folder}: {error.strerror}") from error
        return found

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def is_there(self) -> bool:
        """Whether a whole export is at ``path``, if one is at all."""
        return (self.path / MANIFEST_OF_EXPORT).exists()

    def former(self) -> dict[str, Any] | None:
        """What ``export.json`` says of an export that is there, whole or not.

        Raises:
            StoreError: something else is there.
        """
        for folder in (self.path, self.partial):
            names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            left = [name for name in names if name != _LOCK and not name.startswith(f"{MANIFEST_OF_EXPORT}.")]
            if not left and (folder.is_dir() or not folder.exists()):
                continue
            if MANIFEST_OF_EXPORT not in left:
                held = ", ".join(left[:3]) or "no folder"
                raise StoreError(
                    f"dest must be a folder that is not there yet, or an export that this one goes on with; {folder} "
                    f"holds something else ({held}): choose another, or take it away"
                )
            found = self._read(folder)
            if folder == self.path and not found["complete"]:
                raise StoreError(f"{folder} is not whole, but has been renamed: its name must be {self.partial}")
            return found
        return None

    def check(self, former: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> int:
        """The number of rows that are whole; raises StoreError if ``former`` is not the export of this ``identity``."""
        if former is None:
            return 0
        differences = [
            f"{key} is {_short(identity[key])}, there it is {_short(former[key])}"
            for key in _IDENTITY
            if former[key] != identity[key]
        ]
        if differences:
            place = self.path if self.is_there else self.partial
            raise StoreError(
                f"{place} holds another export: {'; '.join(differences)}. Choose another dest, or delete that one"
            )
        rows: int = former["rows"]
        return rows

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Make the folder in which the export grows, and hold it against other processes."""
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"dest must be where a folder can be made; got {self.path}: {error}") from error
        with Folder.at(self.partial).exclusive():
            yield

    def note(self, rows: int, manifest: Mapping[str, Any], *, complete: bool = False) -> dict[str, Any]:
        """Write ``export.json``: so many rows are whole, or all; gives what it says."""
        value = {"complete": complete, "rows": rows, **manifest}
        folder = Folder.at(self.partial)
        folder.sweep("")
        folder.write_json(MANIFEST_OF_EXPORT, value)
        return value

    def finish(self, rows: int, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Give the export its name; gives what its ``export.json`` says."""
        whole = self.note(rows, manifest, complete=True)
        os.rename(self.partial, self.path)
        (self.path / _LOCK).unlink(missing_ok=True)
        return whole

    def drop(self) -> None:
        """Delete the folder in which the export grew."""
        shutil.rmtree(self.partial)

    @staticmethod
    def _read(folder: Path) -> dict[str, Any]:
        path = folder / MANIFEST_OF_EXPORT
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path} is damaged, or cannot be read: {error}. Delete {folder}, and start anew"
            ) from error
        if not isinstance(value, dict) or not value.keys() >= _KEYS:
            raise StoreError(f"{path} is not that of an export: choose another dest")
        return value


def _short(value: object) -> object:
    return {key: value[key] for key in ("fingerprint", "digest")} if isinstance(value, Mapping) else repr(value)
