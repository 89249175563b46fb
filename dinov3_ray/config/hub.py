"""Finds a model directory: by its path, in a cache of the Hugging Face Hub, or by an id, whose files it downloads.

An id is resolved to a commit once. From then on that commit is looked for, on whatever machine the model is needed.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, TypeVar

from dinov3_ray.config.hub_access import HubAccess, carried_access
from dinov3_ray.config.hub_errors import cannot_write, hub_failures, is_passing, reason_of_failure, refusal
from dinov3_ray.config.weights import INDEX_FILE, SINGLE_FILE, read_weight_map
from dinov3_ray.errors import CheckpointError, ConfigError, DinoV3Error

__all__ = ["DESCRIPTION_FILES", "ModelPlace", "is_hub_id", "resolve"]

log = logging.getLogger("dinov3_ray")

DESCRIPTION_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
"""What describes a model, where a repository has it; all that is downloaded before the weights are needed."""

_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]{0,95}[A-Za-z0-9_]", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DEFAULT = "main"
_PAUSES = (1.0, 2.0)  # seconds before a call that failed in passing is repeated
_KINDS = {"datasets": "a data set", "spaces": "a space"}

Result = TypeVar("Result")


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
        own = _snapshot(access.cache, self.hub_id, self.commit)
        for place in (self.directory, own):
            if not _missing_weights(place):
                return place
        there = self.directory.parents[2]  # the cache of the process that resolved it
        keeps = there.is_dir() and os.access(there, os.W_OK) and (self.sender is None or not access.cache_is_chosen)
        return _Repository(self.hub_id, access, there if keeps else access.cache).download_weights(self.commit)


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
        return f"{directory} is a file"
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


# Directories ----------------------------------------------------------------------------------------------------------


def _in_directory(directory: Path, revision: str | None) -> ModelPlace:
    """What a directory that exists holds: a model, or the hub's cache of one."""
    snapshot = _as_snapshot(directory)
    if snapshot is not None:
        _agreed(snapshot, revision)
        return snapshot
    hub_id = _id_of_folder(directory)
    if hub_id is not None:
        return _in_cache(directory, hub_id, revision or _DEFAULT)
    kind = directory.name.partition("--")[0]
    if kind in _KINDS and (directory / "snapshots").is_dir():
        raise ConfigError(f"root must be a model; {directory} is the hub's cache for {_KINDS[kind]}")
    cached = [
        found for hub in (directory, directory / "hub") for path in _entries(hub) if (found := _id_of_folder(path))
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
    commit = _cached_commit(folder, revision)
    held = sorted(path.name for path in _entries(folder / "snapshots") if _COMMIT.fullmatch(path.name))
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
        f"the id, {hub_id!r}, in place of this folder, and it is downloaded)"
    )


def _as_snapshot(directory: Path) -> ModelPlace | None:
    """``.../models--owner--name/snapshots/COMMIT`` as what it is, whether it exists or not."""
    if not _COMMIT.fullmatch(directory.name) or directory.parent.name != "snapshots":
        return None
    hub_id = _id_of_folder(directory.parents[1])
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


def _id_of_folder(path: Path) -> str | None:
    """``owner/name`` of the hub's cache folder for a model."""
    return path.name.removeprefix("models--").replace("--", "/") if path.name.startswith("models--") else None


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _snapshot(cache: Path, hub_id: str, commit: str) -> Path:
    return cache / f"models--{hub_id.replace('/', '--')}" / "snapshots" / commit


def _cached_commit(folder: Path, revision: str) -> str | None:
    """The commit that a cache folder has for ``revision``, with at least its config.json."""
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    described = _COMMIT.fullmatch(commit) and (folder / "snapshots" / commit / DESCRIPTION_FILES[0]).is_file()
    return commit if described else None


def _missing_weights(directory: Path) -> list[str]:
    """Names of the files that a snapshot needs and has not (completely)."""
    if (directory / SINGLE_FILE).is_file():
        return []
    if (directory / INDEX_FILE).is_file():
        return [name for name in _shards(directory) if not (directory / name).is_file()]
    return [SINGLE_FILE]


def _shards(directory: Path) -> list[str]:
    return sorted(set(read_weight_map(directory / INDEX_FILE).values()))


# The hub --------------------------------------------------------------------------------------------------------------


def _from_hub(hub_id: str, revision: str | None, directory: Path | None = None) -> ModelPlace:
    """``hub_id`` at the commit that ``revision`` is now; ``directory`` is what the id would be as a path."""
    access = HubAccess.here()
    repository = _Repository(hub_id, access, access.cache, directory)
    wanted = revision or _DEFAULT
    commit = _cached_commit(repository.folder, wanted)
    if commit == wanted and all(
        (_snapshot(access.cache, hub_id, commit) / name).is_file() for name in DESCRIPTION_FILES[:2]
    ):
        return ModelPlace(repository.snapshot(commit), hub_id, commit)  # nothing that the hub could add
    return repository.describe(wanted, cached=commit)


@dataclass(frozen=True, slots=True)
class _Repository:
    """A model on the hub, and its folder in a cache of this machine."""

    hub_id: str
    access: HubAccess
    cache: Path
    directory: Path | None = None

    @property
    def folder(self) -> Path:
        return self.snapshot("").parents[0]

    def snapshot(self, commit: str) -> Path:
        return _snapshot(self.cache, self.hub_id, commit)

    def describe(self, revision: str, *, cached: str | None) -> ModelPlace:
        """Resolve ``revision``, and download what describes it; ``cached`` is the commit that the cache has for it."""
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            commit, names = self._ask(revision, patient=cached is None)
            self._require_safetensors(names, commit)
            self._download(commit, [name for name in DESCRIPTION_FILES if name in names], quiet=True)
        except DinoV3Error as error:
            cause = error.__cause__
            if cached is None or cause is None or isinstance(cause, RevisionNotFoundError) or cannot_write(cause):
                raise
            if not self.access.offline:
                log.warning(
                    "%s: the hub at %s does not help: %s. Going on with commit %s, which the cache %s has for %r",
                    self.hub_id,
                    self.access.url,
                    reason_of_failure(cause),
                    cached,
                    self.cache,
                    revision,
                )
            return ModelPlace(self.snapshot(cached), self.hub_id, cached)
        self._remember(revision, commit)
        return ModelPlace(self.snapshot(commit), self.hub_id, commit)

    def download_weights(self, commit: str) -> Path:
        """The snapshot of ``commit``, complete."""
        _, names = self._ask(commit)
        self._require_safetensors(names, commit)
        described = [name for name in DESCRIPTION_FILES if name in names]
        self._download(commit, [*described, SINGLE_FILE if SINGLE_FILE in names else INDEX_FILE])
        if SINGLE_FILE not in names:
            shards = _shards(self.snapshot(commit))
            absent = [name for name in shards if name not in names]
            if absent:
                raise CheckpointError(
                    f"{INDEX_FILE} of {self.hub_id} at commit {commit} names {len(shards)} shards; the repository "
                    f"lacks {', '.join(absent)}"
                )
            self._download(commit, shards)
        return self.snapshot(commit)

    def _ask(self, revision: str, *, patient: bool = True) -> tuple[str, frozenset[str]]:
        """The commit that ``revision`` is, and the names of its files; ``patient`` repeats what fails in passing."""

        def ask() -> tuple[str, frozenset[str]]:
            from huggingface_hub import HfApi, constants
            from huggingface_hub.errors import OfflineModeIsEnabled

            if self.access.offline:
                raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
            hub = HfApi(endpoint=self.access.endpoint, token=self.access.token)
            info = hub.model_info(self.hub_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            if not _COMMIT.fullmatch(info.sha or ""):
                raise ValueError(f"it names no commit of {self.hub_id}")
            return str(info.sha), frozenset(one.rfilename for one in info.siblings or ())

        return self._try(ask, revision, patient=patient)

    def _download(self, commit: str, names: Collection[str], *, quiet: bool = False) -> None:
        """Download files into the cache, those apart that it has; huggingface_hub shows progress on a terminal."""
        if all((self.snapshot(commit) / name).is_file() for name in names):
            return

        shown = sys.stderr.isatty() and not quiet

        def download() -> None:
            from huggingface_hub import snapshot_download
            from huggingface_hub.utils import tqdm

            class Bar(tqdm):  # type: ignore[misc]
                def __init__(self, *args: Any, **settings: Any) -> None:
                    super().__init__(*args, **settings | ({} if shown else {"disable": True}))

            snapshot_download(
                self.hub_id,
                revision=commit,
                allow_patterns=list(names),
                cache_dir=self.cache,
                endpoint=self.access.endpoint,
                token=self.access.token,
                tqdm_class=Bar,
            )

        self._try(download, commit, patient=False)  # huggingface_hub repeats what fails within a file
        missing = [name for name in names if not (self.snapshot(commit) / name).is_file()]
        if missing:  # a hub that went away in between: huggingface_hub then returns what the cache has
            raise CheckpointError(self._unreachable(commit, f"{', '.join(missing)} did not arrive"))

    def _try(self, call: Callable[[], Result], revision: str, *, patient: bool = True) -> Result:
        """What ``call`` returns.

        Raises:
            ConfigError, CheckpointError: from what it raised.
        """
        pauses: Iterable[float | None] = (*_PAUSES, None) if patient else (None,)
        for pause in pauses:
            try:
                return call()
            except hub_failures() as error:
                if pause is None or not is_passing(error):
                    raise self._explained(error, revision) from error
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _explained(self, error: Exception, revision: str) -> DinoV3Error:
        told = refusal(
            error, self.hub_id, revision, self.access, directory=self.directory, is_dataset=self._is_dataset(error)
        )
        if told is not None:
            return told
        if cannot_write(error):
            return CheckpointError(
                f"{self.hub_id} cannot be stored in the cache {self.cache}: {reason_of_failure(error)} (make room "
                "there, or name another with HF_HOME or HF_HUB_CACHE)"
            )
        return CheckpointError(self._unreachable(revision, reason_of_failure(error)))

    def _unreachable(self, revision: str, reason: str) -> str:
        offline = reason == "HF_HUB_OFFLINE is set"
        remedy = (
            "unset HF_HUB_OFFLINE, or name with HF_HOME a cache that has it"
            if offline
            else "check the network and, where they are set, HTTPS_PROXY and HF_ENDPOINT; or copy the cache of a "
            "machine that has the model, and set HF_HUB_OFFLINE=1"
        )
        neither = f"{self.directory} is missing, and " if self.directory is not None else ""
        where = "the hub is not asked" if offline else f"the hub at {self.access.url} does not help"
        return (
            f"{neither}{self.hub_id} at {revision!r} cannot be had from the hub: {where}, since {reason}; "
            f"{self._cached(revision)} ({remedy})"
        )

    def _cached(self, revision: str) -> str:
        """What the cache has of a model that it does not have."""
        commit = _cached_commit(self.folder, revision)
        if commit is not None:
            partial = any(path.suffix == ".incomplete" for path in _entries(self.folder / "blobs"))
            return (
                f"the cache {self.cache} has a part of it, without {', '.join(_missing_weights(self.snapshot(commit)))}"
                f"{', whose download was interrupted' if partial else ''}"
            )
        held = sorted(path.name for path in _entries(self.folder / "snapshots"))
        if held:
            return f"the cache {self.cache} has other commits of it: {', '.join(held)}"
        return f"the cache {self.cache} has {'no snapshot' if self.folder.is_dir() else 'nothing'} of it"

    def _is_dataset(self, error: Exception) -> bool:
        """Whether an unknown model is a data set that is known."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        if not isinstance(error, RepositoryNotFoundError) or isinstance(error, GatedRepoError):
            return False
        try:
            HfApi(endpoint=self.access.endpoint, token=self.access.token).dataset_info(self.hub_id, timeout=5)
        except hub_failures():
            return False
        return True

    def _require_safetensors(self, names: Collection[str], commit: str) -> None:
        if SINGLE_FILE in names or INDEX_FILE in names:
            return
        others = sorted(name for name in names if re.search(r"\.(bin|pth|pt|msgpack|h5|onnx|gguf|safetensors)$", name))
        raise CheckpointError(
            f"{self.hub_id} at commit {commit} must hold {SINGLE_FILE} or {INDEX_FILE}; it has "
            f"{', '.join(others) or 'no weights'} (a revision with safetensors may exist: see {self.access.url}/"
            f"{self.hub_id}/discussions; or convert its files to a model directory, and give that)"
        )

    def _remember(self, revision: str, commit: str) -> None:
        """Note what ``revision`` is, as huggingface_hub does, for when the hub cannot be asked."""
        note = self.folder / "refs" / revision
        if revision == commit or _cached_commit(self.folder, revision) == commit:
            return
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            fresh = note.with_name(f"{note.name}.{os.getpid()}.tmp")
            fresh.write_text(commit, encoding="ascii")
            fresh.replace(note)
        except OSError as error:
            log.warning("%s cannot be noted as what %r of %s is: %s", commit, revision, self.hub_id, error)
