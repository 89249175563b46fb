"""Whether a directory's weights are what its configuration says, by their headers and, if asked, by their values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dinov3_ray.checkpoint.tensors import check_shapes, read_tensors, require_finite
from dinov3_ray.checkpoint.transformers_weights import load_transformers
from dinov3_ray.config import ModelConfig, TransformersConfig
from dinov3_ray.config.architecture import TransformersArchitecture
from dinov3_ray.config.weights import WeightFiles

__all__ = ["Progress", "ignore_progress", "verify"]

Progress = Callable[[int], None]
"""Called with the number of bytes that were done since the last call."""


def ignore_progress(nbytes: int) -> None:
    """A :data:`Progress` that nobody watches."""


def verify(config: ModelConfig, *, values: bool = False, progress: Progress = ignore_progress) -> WeightFiles:
    """Check the weights of ``config`` against it; download those of a model of the hub that this machine lacks.

    Args:
        config: the model.
        values: read every tensor too, and refuse NaN and infinity.
        progress: called with the bytes of each tensor that was read.

    Raises:
        CheckpointError: names what is missing, damaged, unexpected or of the wrong shape: expected and found.
    """
    root = config.place.with_weights()
    weights = WeightFiles.find(root, buffers=isinstance(config, TransformersConfig))
    if isinstance(config, TransformersConfig):  # transformers knows its tensors only as it loads them
        if values:
            load_transformers(config, torch.device("cpu"), torch.float32)
            progress(weights.nbytes)
        return weights
    assert not isinstance(config.architecture, TransformersArchitecture)
    check_shapes(str(root), config.architecture.tensors(), weights.shapes)
    if values:
        for stored, tensor in read_tensors(weights):
            require_finite(stored.file, stored.key, tensor)
            progress(stored.nbytes)
    return weights
