"""A model on the Hugging Face Hub: asks what a revision is, and downloads a commit's files into a cache."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dinov3_ray.config.hub.access import HubAccess
from dinov3_ray.config.hub.downloads import watching_download
from dinov3_ray.config.hub.refusals import (
    cannot_write,
    hub_failures,
    is_offline,
    is_passing,
    reason_of_failure,
    refusal,
)
from dinov3_ray.config.hub.snapshots import (
    COMMIT,
    DESCRIPTION_FILES,
    cached_commit,
    entries_of,
    is_interrupted,
    missing_weights,
    shards_of,
    snapshot_folder,
)
from dinov3_ray.config.weights import INDEX_FILE, SINGLE_FILE
from dinov3_ray.errors import CheckpointError, DinoV3Error

__all__ = ["Repository"]

log = logging.getLogger("dinov3_ray")

_PAUSES = (1.0, 2.0)  # seconds before a call that failed in passing is repeated

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Repository:
    """A model on the hub, and its folder in a cache of this machine."""

    hub_id: str
    access: HubAccess
    cache: Path
    directory: Path | None = None

    @property
    def folder(self) -> Path:
        return self.snapshot("").parents[0]

    def snapshot(self, commit: str) -> Path:
        return snapshot_folder(self.cache, self.hub_id, commit)

    def describe(self, revision: str, *, cached: str | None) -> str:
        """The commit that ``revision`` is, with what describes it in the cache.

        Args:
            revision: a branch, a tag or a commit.
            cached: the commit that the cache has for it, to go on with where the hub does not help.

        Raises:
            ConfigError, CheckpointError: the hub does not have it, or does not give it.
        """
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            commit, names = self._ask(revision, patient=cached is None)
            self._require_safetensors(names, commit)
            self._download(commit, [name for name in DESCRIPTION_FILES if name in names])
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
            return cached
        self._remember(revision, commit)
        return commit

    def download_weights(self, commit: str) -> Path:
        """The snapshot of ``commit``, complete.

        Raises:
            ConfigError, CheckpointError: as in :meth:`describe`.
        """
        _, names = self._ask(commit)
        self._require_safetensors(names, commit)
        first = [name for name in (*DESCRIPTION_FILES, SINGLE_FILE) if name in names]
        if SINGLE_FILE in names:
            self._download(commit, first, names)
            return self.snapshot(commit)
        self._download(commit, [*first, INDEX_FILE], names)
        shards = shards_of(self.snapshot(commit))
        absent = [name for name in shards if name not in names]
        if absent:
            raise CheckpointError(
                f"{INDEX_FILE} of {self.hub_id} at commit {commit} names {len(shards)} shards; the repository lacks "
                f"{', '.join(absent)}"
            )
        self._download(commit, shards, names)
        return self.snapshot(commit)

    def _ask(self, revision: str, *, patient: bool = True) -> tuple[str, dict[str, int]]:
        """The commit that ``revision`` is, and the bytes of its files by name (0: not said).

        Args:
            patient: repeat what fails in passing.
        """

        def ask() -> tuple[str, dict[str, int]]:
            from huggingface_hub import HfApi, constants
            from huggingface_hub.errors import OfflineModeIsEnabled

            if self.access.offline:
                raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
            hub = HfApi(endpoint=self.access.endpoint, token=self.access.token)
            info = hub.model_info(
                self.hub_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
            if not COMMIT.fullmatch(info.sha or ""):
                raise ValueError(f"it names no commit of {self.hub_id}")
            return str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()}

        return self._try(ask, revision, patient=patient)

    def _download(self, commit: str, names: Collection[str], sizes: Mapping[str, int] | None = None) -> None:
        """Download files into the cache, those apart that it has.

        Args:
            sizes: bytes of each, to show progress, on a terminal or in the log; None shows none.
        """
        missing = [name for name in names if not (self.snapshot(commit) / name).is_file()]
        if not missing:
            return
        on_terminal = sizes is not None and sys.stderr.isatty()

        def download() -> None:
            from huggingface_hub import snapshot_download
            from huggingface_hub.utils import tqdm

            class Bar(tqdm):  # type: ignore[misc]
                def __init__(self, *args: Any, **settings: Any) -> None:
                    super().__init__(*args, **settings | ({} if on_terminal else {"disable": True}))

            snapshot_download(
                self.hub_id,
                revision=commit,
                allow_patterns=list(names),
                cache_dir=self.cache,
                endpoint=self.access.endpoint,
                token=self.access.token,
                tqdm_class=Bar,
            )

        total = sum(sizes.get(name, 0) for name in missing) if sizes else 0
        in_log = sizes is not None and not on_terminal
        with watching_download(self.hub_id, self.folder, total, in_log=in_log):
            self._try(download, commit)  # not each version of huggingface_hub repeats what was cut
        missing = [name for name in names if not (self.snapshot(commit) / name).is_file()]
        if missing:  # a hub that went away in between: huggingface_hub then returns what the cache has
            raise CheckpointError(self._unreachable(commit, f"{', '.join(missing)} did not arrive", offline=False))

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
        return CheckpointError(self._unreachable(revision, reason_of_failure(error), offline=is_offline(error)))

    def _unreachable(self, revision: str, reason: str, *, offline: bool) -> str:
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
        commit = cached_commit(self.folder, revision)
        if commit is not None:
            return (
                f"the cache {self.cache} has a part of it, without {', '.join(missing_weights(self.snapshot(commit)))}"
                f"{', whose download was interrupted' if is_interrupted(self.folder) else ''}"
            )
        held = sorted(path.name for path in entries_of(self.folder / "snapshots"))
        if revision in held:
            return f"the cache {self.cache} has a snapshot of it without {DESCRIPTION_FILES[0]}"
        if held:
            return f"the cache {self.cache} has other commits of it, to be named by revision: {', '.join(held)}"
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
        if revision == commit or cached_commit(self.folder, revision) == commit:
            return
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            fresh = note.with_name(f"{note.name}.{os.getpid()}.tmp")
            fresh.write_text(commit, encoding="ascii")
            fresh.replace(note)
        except OSError as error:
            log.warning("%s cannot be noted as what %r of %s is: %s", commit, revision, self.hub_id, error)
