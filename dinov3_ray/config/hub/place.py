"""Finds a model directory: by its path, in a cache of the Hugging Face Hub, or by an id, whose files it downloads.

An id is resolved to a commit once. From then on that commit is looked for, on whatever machine the model is needed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path, PurePath

from dinov3_ray.config.directory import CONFIG_FILE, conversion_remedy
from dinov3_ray.config.hub.access import HubAccess, carried_access
from dinov3_ray.config.hub.repository import Repository
from dinov3_ray.config.hub.snapshots import (
    COMMIT,
    DESCRIPTION_FILES,
    cached_commit,
    entries_of,
    id_of_folder,
    missing_weights,
    snapshot_folder,
)
from dinov3_ray.errors import CheckpointError, ConfigError

__all__ = ["ModelPlace", "is_hub_id", "resolve"]

_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]{0,95}[A-Za-z0-9_]", re.ASCII)
_DEFAULT = "main"
_KINDS = {"datasets": "a data set", "spaces": "a space"}


@dataclass(frozen=True, slots=True)
class ModelPlace(PathLike[str]):
    """Where a model's files are.

    Attributes:
        directory: the model directory, on the machine that resolved it.
        hub_id: of a model that the hub has; None for a directory of one's own.
        commit: of a model that the hub has: 40 hexadecimal digits, whatever branch or tag was asked for.
    """

    directory: Path
    hub_id: str | None = None
    commit: str | None = None
    sender: HubAccess | None = field(default=None, repr=False, compare=False)
    """The access of the process that sent this here."""

    def __fspath__(self) -> str:
        return str(self.directory)

    @property
    def origin(self) -> str:
        """``owner/name@commit`` of a model of the hub, else the directory: the same in all processes, for people."""
        return str(self.directory) if self.hub_id is None else f"{self.hub_id}@{self.commit}"

    def __reduce__(self) -> tuple[type[ModelPlace], tuple[object, ...]]:
        return ModelPlace, (self.directory, self.hub_id, self.commit, carried_access())

    def with_weights(self) -> Path:
        """The model directory on this machine, with weights; those of a model of the hub are downloaded if need be.

        The directory that was resolved serves where this machine has it too, then this machine's own cache.

        Raises:
            CheckpointError: the weights are nowhere, and cannot be downloaded; says why. A directory of one's own is
                not looked into.
            ConfigError: the hub does not know the id or the commit (any longer).
        """
        if self.hub_id is None or self.commit is None:
            return self.directory
        access = HubAccess.here().completed_by(self.sender)
        own = snapshot_folder(access.cache, self.hub_id, self.commit)
        for place in (self.directory, own):
            if not missing_weights(place):
                return place
        there = self.directory.parents[2]  # the cache of the process that resolved it
        keeps = there.is_dir() and os.access(there, os.W_OK) and (self.sender is None or not access.cache_is_chosen)
        return Repository(self.hub_id, access, there if keeps else access.cache).download_weights(self.commit)


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form of a model's id: ``owner/name``."""
    return _ID.fullmatch(text) is not None and not re.search(r"--|\.\.|\.git$", text)


def resolve(root: str | PathLike[str], revision: str | None = None, *, folder: str | PathLike[str] = "") -> ModelPlace:
    """The model that ``root`` names, described (:data:`DESCRIPTION_FILES`) but not yet with weights.

    A directory goes before an id of the same spelling, as in transformers. A folder of the hub's cache is the model
    that it holds. The commit of an id is asked of the hub; where the hub cannot be reached, it is the one that this
    machine's cache has for that revision, with a warning.

    Args:
        root: the path of a model directory, or a model's id on the hub, such as
            ``facebook/dinov3-vits16-pretrain-lvd1689m``.
        revision: with an id: a branch, a tag or a commit; by default ``main``.
        folder: at which a relative path starts; by default the working directory.

    Raises:
        ConfigError: there is no such directory, model or revision.
        CheckpointError: the hub cannot be reached or gives nothing, or the model has no safetensors.
    """
    if not isinstance(root, (str, PathLike)):
        raise ConfigError(
            f"root must be the path of a model directory, or the id of a model on the hub (owner/name); got {root!r}"
        )
    if revision is not None and (
        not isinstance(revision, str) or not re.fullmatch(r"(?!.*\.\.)[^\s\\:?*\[]+", revision)
    ):
        raise ConfigError(f"revision must be a branch, a tag or a commit of a model on the hub; got {revision!r}")
    if isinstance(root, ModelPlace):
        directory, text = root.directory, ""
    else:
        # A str as it is: pathlib takes the second slash out of a URL.
        text = root if isinstance(root, str) else PurePath(root).as_posix()
        directory = (Path(folder) / Path(text).expanduser()).absolute()
    if directory.is_dir():
        return _in_directory(directory, revision)
    cached = _as_snapshot(directory)
    if cached is not None and cached.hub_id is not None:  # of a process on another machine
        return _from_hub(cached.hub_id, _agreed(cached, revision))
    if not directory.exists() and is_hub_id(text):
        return _from_hub(text, revision, directory)
    raise ConfigError(f"root must be a model directory with config.json and weights; {_what_else(directory, text)}")


def _what_else(directory: Path, text: str) -> str:
    if directory.exists():
        in_one = (directory.parent / CONFIG_FILE).is_file()
        return f"{directory} is a file: {'name its folder' if in_one else conversion_remedy(directory)}"
    found = re.match(
        r"(?:hf://|https?://[^/]+/)(?:models/)?([^/]+/[^/?#@]+)(?:/(?:tree|blob|resolve)/([^/?#]+))?", text
    )
    if found and is_hub_id(found[1]):
        branch = f", and revision {found[2]!r}" if found[2] else ""
        return f"{directory} is missing (for a model on the hub, give its id, {found[1]!r}{branch})"
    if "@" in text and is_hub_id(text.partition("@")[0]):
        hub_id, _, revision = text.partition("@")
        return f"{directory} is missing (for a model on the hub, give its id, {hub_id!r}, and revision {revision!r})"
    if directory.is_absolute() and PurePath(text).is_absolute():
        return f"{directory} is missing"
    return (
        f"{directory} is missing (and {text!r} is not the id of a model on the hub, which has the form owner/name, of "
        "letters, digits, '-', '_' and '.')"
    )


def _from_hub(hub_id: str, revision: str | None, directory: Path | None = None) -> ModelPlace:
    """``hub_id`` at the commit that ``revision`` is now; ``directory`` is what the id would be as a path."""
    access = HubAccess.here()
    repository = Repository(hub_id, access, access.cache, directory)
    wanted = revision or _DEFAULT
    commit = cached_commit(repository.folder, wanted)
    # To a commit whose description the cache has, the hub could add nothing.
    if commit != wanted or not all((repository.snapshot(commit) / name).is_file() for name in DESCRIPTION_FILES[:2]):
        commit = repository.describe(wanted, cached=commit)
    return ModelPlace(repository.snapshot(commit), hub_id, commit)


# Directories ----------------------------------------------------------------------------------------------------------


def _in_directory(directory: Path, revision: str | None) -> ModelPlace:
    """What a directory that exists holds: a model, or the hub's cache of one."""
    snapshot = _as_snapshot(directory)
    if snapshot is not None:
        _agreed(snapshot, revision)
        return snapshot
    if directory.name == "snapshots" and id_of_folder(directory.parent):
        directory = directory.parent
    hub_id = id_of_folder(directory)
    if hub_id is not None:
        return _in_cache(directory, hub_id, revision or _DEFAULT)
    kind = directory.name.partition("--")[0]
    if kind in _KINDS and (directory / "snapshots").is_dir():
        raise ConfigError(f"root must be a model; {directory} is the hub's cache for {_KINDS[kind]}")
    cached = [
        found for hub in (directory, directory / "hub") for path in entries_of(hub) if (found := id_of_folder(path))
    ]
    if cached and not (directory / DESCRIPTION_FILES[0]).exists():
        raise ConfigError(
            f"root must be a model directory or the id of a model; {directory} is a cache of the hub with "
            f"{', '.join(sorted(cached))} (give the id; HF_HOME or HF_HUB_CACHE says where the cache is)"
        )
    if revision is not None:
        raise ConfigError(
            f"revision goes with the id of a model on the hub; got {revision!r} with the directory {directory}, which "
            "goes before an id of the same spelling (leave revision out, or move the directory)"
        )
    return ModelPlace(directory)


def _in_cache(folder: Path, hub_id: str, revision: str) -> ModelPlace:
    """The model in the hub's cache folder for it, ``models--owner--name``: as an id, but without the hub."""
    commit = cached_commit(folder, revision)
    held = sorted(path.name for path in entries_of(folder / "snapshots") if COMMIT.fullmatch(path.name))
    if commit is None and revision == _DEFAULT and len(held) == 1:
        (commit,) = held
    if commit is not None:
        return ModelPlace(folder / "snapshots" / commit, hub_id, commit)
    if held:
        raise ConfigError(
            f"revision must be one that {folder} holds, which has the commits {', '.join(held)}; got {revision!r}"
        )
    raise CheckpointError(
        f"{folder} is the hub's cache for {hub_id}, but holds no snapshot of it: no download was ever finished (give "
        f"the id, {hub_id!r}, in place of this folder, and it is downloaded, unless HF_HUB_OFFLINE is set)"
    )


def _as_snapshot(directory: Path) -> ModelPlace | None:
    """``.../models--owner--name/snapshots/COMMIT`` as what it is, whether it exists or not."""
    if not COMMIT.fullmatch(directory.name) or directory.parent.name != "snapshots":
        return None
    hub_id = id_of_folder(directory.parents[1])
    return None if hub_id is None else ModelPlace(directory, hub_id, directory.name)


def _agreed(snapshot: ModelPlace, revision: str | None) -> str:
    """The commit of ``snapshot``, which must be what ``revision`` asks for, if it asks."""
    assert snapshot.commit is not None
    if revision is not None and not snapshot.commit.startswith(revision):
        raise ConfigError(
            f"revision must be that of the snapshot that root names, {snapshot.commit}; got {revision!r} (give the id, "
            f"{snapshot.hub_id!r}, to have another)"
        )
    return snapshot.commit
