"""A model directory in transformers' layout, written tensor by tensor and visible only when it is complete."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dinov3_ray.checkpoint.hf import config_json, preprocessor_json
from dinov3_ray.checkpoint.tensors import DTYPES
from dinov3_ray.checkpoint.verify import Progress, ignore_progress
from dinov3_ray.config.architecture import Architecture
from dinov3_ray.config.directory import CONFIG_FILE, INDEX_FILE, PREPROCESSOR_FILE, SINGLE_FILE
from dinov3_ray.config.preprocessing import Preprocessing
from dinov3_ray.errors import CheckpointError, ConfigError

__all__ = ["DEFAULT_SHARD_BYTES", "require_free", "write_directory"]

DEFAULT_SHARD_BYTES = 5 * 10**9
"""transformers' own limit for long; 7B in float32 makes six shards."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the first tensor's bytes, as the library's writer has it


def write_directory(
    directory: Path,
    architecture: Architecture,
    preprocessing: Preprocessing,
    tensor: Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = ignore_progress,
    license: str | None = None,
) -> None:
    """Write a whole model directory; one tensor at a time is in memory.

    Args:
        directory: must not exist, or be empty. It appears under its name when all is written, or not at all.
        tensor: gives the tensor of a name; its shape must be what ``architecture`` says.
        dtype: that the tensors are stored in.
        shard_bytes: the largest size of one file; where all fits into one, there is no index.
        progress: called with the bytes of each tensor written.
        license: of the weights, for config.json.

    Raises:
        CheckpointError: ``directory`` is in use or cannot be written.
        ConfigError: ``shard_bytes`` is not a positive integer.
    """
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes must be >= 1; got {shard_bytes!r}")
    shapes = architecture.tensors()
    shards = _plan_shards(shapes, dtype.itemsize, shard_bytes)
    with _appearing(directory) as folder:
        _write_json(folder / CONFIG_FILE, config_json(architecture, str(dtype).removeprefix("torch."), license))
        _write_json(folder / PREPROCESSOR_FILE, preprocessor_json(preprocessing))
        for file_name, names in shards.items():
            with (folder / file_name).open("wb") as stream:
                _write_header(stream, {name: shapes[name] for name in names}, dtype)
                for name in names:
                    _write_tensor(stream, tensor(name).to(dtype), shapes[name], name)
                    progress(math.prod(shapes[name]) * dtype.itemsize)
        if len(shards) > 1:
            total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            weight_map = {name: file_name for file_name, names in shards.items() for name in names}
            _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> dict[str, list[str]]:
    """Tensor names by file: filled in order up to ``limit`` bytes; a tensor larger than that has a file for itself."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if not shards or nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{index:05d}-of-{len(shards):05d}.safetensors": shard for index, shard in enumerate(shards, 1)}


def _write_header(stream: BinaryIO, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    stream.write(len(text).to_bytes(8, "little") + text)


def _write_tensor(stream: BinaryIO, tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    assert tuple(tensor.shape) == shape, f"{name}: {list(tensor.shape)} instead of {list(shape)}"
    # NumPy has no bfloat16; bytes it has.
    stream.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def require_free(directory: Path) -> Path:
    """The absolute path of ``directory``, if a model can be written there.

    Raises:
        CheckpointError: it exists, and is not an empty directory.
    """
    directory = Path(directory).expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} is in use already: choose another directory, or remove it first")
    return directory


@contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """A temporary folder next to ``directory`` that takes its name at the end, or is removed."""
    directory = require_free(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from error
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it the owner's alone
        os.replace(folder, directory)  # takes the place of an empty directory too, but of no other
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"{directory} cannot be written: {error}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
