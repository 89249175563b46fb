"""The files of a checkpoint that is to be converted, in what a user names: a file, or a folder of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3_ray.config.directory import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_FILE,
    TORCH_INDEX_FILE,
    missing_target,
)
from dinov3_ray.config.files import read_json
from dinov3_ray.errors import CheckpointError, ConfigError

__all__ = ["Located", "locate"]

_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")


@dataclass(frozen=True, slots=True)
class Located:
    """What was found.

    Attributes:
        files: with the weights.
        folder: of a model, whose JSON files describe it; None if a file stands for itself.
        config: the values of config.json there, if there is one.
    """

    files: tuple[Path, ...]
    folder: Path | None
    config: dict[str, Any]


def locate(path: Path) -> Located:
    """Find the weights in ``path``, and what describes them.

    Raises:
        CheckpointError: there are none, or it cannot be known which; or nothing is to be converted.
        ConfigError: a config.json beside them is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path} cannot be read: it {missing_target(path) or 'is missing'}")
    if path.name in (INDEX_FILE, TORCH_INDEX_FILE):
        return Located(tuple(_shards(path)), path.parent, _config(path.parent))
    if not path.is_dir():
        # On the hub, weights have these names, and a config.json beside them is theirs.
        shared = path.name in (SINGLE_FILE, TORCH_FILE) and (path.parent / CONFIG_FILE).is_file()
        return Located((path,), path.parent, _config(path.parent)) if shared else Located((path,), None, {})
    config = _config(path)
    if str(config.get("model_type", "")).startswith("dinov3") and any(
        (path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)
    ):
        raise CheckpointError(f"{path} is a model directory already: give it as it is (`--root {path}`)")
    for name in (SINGLE_FILE, TORCH_FILE):
        if (path / name).is_file():
            return Located((path / name,), path, config)
    for name in (INDEX_FILE, TORCH_INDEX_FILE):
        if (path / name).is_file():
            return Located(tuple(_shards(path / name)), path, config)
    return Located((_only_file(path),), path, config)


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG_FILE, remedy="") if (folder / CONFIG_FILE).is_file() else {}


def _shards(index: Path) -> Iterator[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} must be a JSON object with a weight_map; got {error!r}") from error
    for name in names:
        if Path(name).name != name:  # it could point anywhere on the machine
            raise ConfigError(f"{index}: weight_map must name files in that directory; got {name!r}")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index} names {name}, which is missing: download it again")
        yield index.parent / name


def _only_file(folder: Path) -> Path:
    names = sorted(entry.name for entry in folder.iterdir())
    files = [name for name in names if name.endswith(_SUFFIXES)]
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise CheckpointError(f"{folder} is a folder with several files of weights: name one of {', '.join(files)}")
    if any(name.endswith(".distcp") for name in names):
        raise CheckpointError(
            f"{folder} is a distributed checkpoint: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{folder} merged.pth` makes a file of it; convert that"
        )
    if (folder / "snapshots").is_dir():
        commits = sorted(entry for entry in (folder / "snapshots").iterdir() if entry.is_dir())
        remedy = f"name a snapshot in it, such as {commits[0]}" if commits else "it has no snapshots: download it again"
        raise CheckpointError(f"{folder} is a repository in the hub's cache: {remedy}")
    raise CheckpointError(
        f"{folder} is a folder without weights ({', '.join(_SUFFIXES)}); it has {', '.join(names[:6]) or 'nothing'}"
    )
