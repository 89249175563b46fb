"""A checkpoint of random weights: the real architecture, for tests, demonstrations and load measurements."""

from __future__ import annotations

import hashlib
import math
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from dinov3_ray.checkpoint.verify import Progress, ignore_progress
from dinov3_ray.checkpoint.write import DEFAULT_SHARD_BYTES, write_directory
from dinov3_ray.config.variants import IMAGENET, VARIANTS, find_variant, preprocessing_for

__all__ = ["init_checkpoint", "random_tensor"]


def init_checkpoint(
    variant: str,
    directory: str | PathLike[str],
    *,
    seed: int = 0,
    image_size: int | tuple[int, int] = 224,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = ignore_progress,
    device: torch.device | str = "cpu",
) -> Path:
    """Write a random-weight checkpoint of ``variant`` to ``directory``, in float32, and return that path.

    Each tensor depends on ``seed``, its name, its shape and the type of ``device`` alone, so that two checkpoints of
    one seed hold the same weights however they are cut into shards. LayerScale, biases and norms are far from 1 and 0:
    a mistake in any of them shows in the outputs.

    Args:
        variant: a name of :data:`VARIANTS`, in any usual spelling.
        directory: must not exist, or be empty.
        image_size: the size in preprocessor_config.json: one int, or (h, w).
        shard_bytes: the largest size of one file.
        progress: called with the bytes of each tensor written.
        device: that draws the numbers; a GPU is the faster one.

    Raises:
        ConfigError: ``variant``, ``image_size`` or ``shard_bytes`` is invalid.
        CheckpointError: ``directory`` is in use or cannot be written.
    """
    architecture = VARIANTS[find_variant(variant)]
    preprocessing = preprocessing_for(IMAGENET, image_size, architecture.patch_size)
    shapes = architecture.tensors()
    write_directory(
        Path(directory),
        architecture,
        preprocessing,
        lambda name: random_tensor(name, shapes[name], seed, device),
        shard_bytes=shard_bytes,
        progress=progress,
    )
    return Path(directory)


def random_tensor(name: str, shape: tuple[int, ...], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The float32 tensor of ``name`` on ``device``: drawn so that activations keep their size through forty blocks."""
    source = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(source[:8], "little") >> 1)
    tensor = torch.randn(shape, generator=generator, device=device)
    kind = name.rsplit(".", 1)[-1]
    if kind in ("lambda1", "gamma"):
        return tensor.mul_(0.05).add_(0.3)
    if kind == "bias":
        return tensor.mul_(0.05)
    if kind == "weight" and len(shape) == 1:
        return tensor.mul_(0.1).add_(1.0)
    if kind == "weight":
        return tensor.mul_(1 / math.sqrt(math.prod(shape[1:])))
    return tensor.mul_(0.5)  # CLS, mask and register tokens
