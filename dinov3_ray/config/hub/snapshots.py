"""The hub's cache on this machine: a folder for each model, with a snapshot of each commit that was downloaded.

Its form is huggingface_hub's (https://huggingface.co/docs/huggingface_hub/guides/manage-cache): ``models--owner--name``
has ``snapshots/COMMIT/FILE``, links to ``blobs``, and ``refs/REVISION``, which hold commits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dinov3_ray.config.weights import INDEX_FILE, SINGLE_FILE, read_weight_map

__all__ = [
    "COMMIT",
    "DESCRIPTION_FILES",
    "cached_commit",
    "entries_of",
    "id_of_folder",
    "is_interrupted",
    "missing_weights",
    "shards_of",
    "snapshot_folder",
]

COMMIT = re.compile(r"[0-9a-f]{40}")

DESCRIPTION_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "README.md")
"""What describes a model and its licence, where a repository has it. Before the weights are needed, no more is
downloaded."""


def id_of_folder(path: Path) -> str | None:
    """``owner/name`` of the hub's cache folder for a model."""
    return path.name.removeprefix("models--").replace("--", "/") if path.name.startswith("models--") else None


def entries_of(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def snapshot_folder(cache: Path, hub_id: str, commit: str) -> Path:
    return cache / f"models--{hub_id.replace('/', '--')}" / "snapshots" / commit


def cached_commit(folder: Path, revision: str) -> str | None:
    """The commit that a cache folder has for ``revision``, with at least its config.json."""
    commit = revision
    if not COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    described = COMMIT.fullmatch(commit) and (folder / "snapshots" / commit / DESCRIPTION_FILES[0]).is_file()
    return commit if described else None


def missing_weights(directory: Path) -> list[str]:
    """Names of the files that a snapshot needs and has not (completely)."""
    if (directory / SINGLE_FILE).is_file():
        return []
    if (directory / INDEX_FILE).is_file():
        return [name for name in shards_of(directory) if not (directory / name).is_file()]
    return [SINGLE_FILE]


def shards_of(directory: Path) -> list[str]:
    return sorted(set(read_weight_map(directory / INDEX_FILE).values()))


def is_interrupted(folder: Path) -> bool:
    """Whether a model's folder has a part of a file, from a process that ended while it downloaded."""
    return any(path.suffix == ".incomplete" for path in entries_of(folder / "blobs"))
