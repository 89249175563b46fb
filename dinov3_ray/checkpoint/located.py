"""Finds the files of a checkpoint to convert in what a user names: a file, or a folder of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3_ray.config.directory import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_FILE,
    TORCH_INDEX_FILE,
    conversion_remedy,
    foreign_type,
    missing_target,
    shards_of_file,
)
from dinov3_ray.config.files import read_json
from dinov3_ray.config.filetype import file_type
from dinov3_ray.config.weights import read_weight_map
from dinov3_ray.errors import CheckpointError

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
        _refuse_foreign(path, path.parent)
        return Located(_indexed(path), path.parent, _config(path.parent))
    if not path.is_dir():
        # On the hub, weights have these names, and a config.json beside them is theirs.
        files = _files_of(path)
        shared = path.name in (SINGLE_FILE, TORCH_FILE) or len(files) > 1
        shared = shared and (path.parent / CONFIG_FILE).is_file()
        if shared:
            _refuse_foreign(path, path.parent)
        return Located(files, path.parent, _config(path.parent)) if shared else Located(files, None, {})
    config = _config(path)
    if "model_type" in config and _has_safetensors(path):
        raise CheckpointError(f"{path} is a model directory already: give it as it is (`--root {path}`)")
    _refuse_foreign(path, path)
    for name in (SINGLE_FILE, TORCH_FILE):
        if (path / name).is_file():
            return Located((path / name,), path, config)
    for name in (INDEX_FILE, TORCH_INDEX_FILE):
        if (path / name).is_file():
            return Located(_indexed(path / name), path, config)
    return Located(_only_model(path), path, config)


def _has_safetensors(folder: Path) -> bool:
    single = folder / SINGLE_FILE
    return (folder / INDEX_FILE).is_file() or (single.is_file() and file_type(single).format == "safetensors")


def _refuse_foreign(path: Path, folder: Path) -> None:
    """Refuse a model of transformers that is not a DINOv3: nothing here converts it, and only its format may be wrong.

    Raises:
        CheckpointError: says what to do.
    """
    if model_type := foreign_type(folder):
        remedy = f"give it as it is (`--root {folder}`)" if _has_safetensors(folder) else conversion_remedy(folder)
        raise CheckpointError(f"{path} is not a DINOv3, but a {model_type} of transformers: {remedy}")


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG_FILE, remedy="") if (folder / CONFIG_FILE).is_file() else {}


def _indexed(index: Path) -> tuple[Path, ...]:
    return _all_there([index.parent / name for name in sorted(set(read_weight_map(index).values()))], f"{index} names")


def _files_of(path: Path) -> tuple[Path, ...]:
    """The files of the model to which the file ``path`` belongs: a shard is a model only with its others."""
    for index in (path.parent / INDEX_FILE, path.parent / TORCH_INDEX_FILE):
        if index.is_file() and path.name in read_weight_map(index).values():
            return _indexed(index)
    shards = shards_of_file(path)
    return _all_there(shards, f"{path} is one of {len(shards)} parts of a model; with it belong") if shards else (path,)


def _all_there(paths: list[Path], what: str) -> tuple[Path, ...]:
    if missing := [path.name for path in paths if not path.exists()]:
        raise CheckpointError(
            f"{what} {', '.join(missing[:6])}{', ...' if len(missing) > 6 else ''}, which "
            f"{'is' if len(missing) == 1 else 'are'} missing: download it again"
        )
    return tuple(paths)


def _only_model(folder: Path) -> tuple[Path, ...]:
    names = sorted(entry.name for entry in folder.iterdir())
    files = [name for name in names if name.endswith(_SUFFIXES)]
    models = {tuple(shards_of_file(folder / name) or [folder / name]) for name in files}
    if len(models) == 1:
        return _files_of(folder / files[0])
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
