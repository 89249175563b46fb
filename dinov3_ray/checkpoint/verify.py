"""Whether a directory's weights are what its configuration says, by their headers and, if asked, by their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from dinov3_ray.checkpoint.transformers_weights import load_transformers
from dinov3_ray.config import ModelConfig, TransformersConfig
from dinov3_ray.config.architecture import TransformersArchitecture
from dinov3_ray.config.weights import StoredTensor, WeightFiles
from dinov3_ray.errors import CheckpointError

__all__ = [
    "DTYPES",
    "Progress",
    "check_shapes",
    "ignore_progress",
    "read_tensor",
    "read_tensors",
    "require_finite",
    "verify",
]

Progress = Callable[[int], None]
"""Called with the number of bytes that were done since the last call."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in a safetensors header."""

_SHOWN = 12  # complaints; a wrong variant breaks hundreds of tensors in the same way


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
            require_finite(stored, tensor)
            progress(stored.nbytes)
    return weights


def check_shapes(where: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors ``found`` that are not exactly those ``expected``.

    Raises:
        CheckpointError: one line a tensor, the first dozen of them.
    """
    problems = []
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name} is missing: expected {list(shape)}")
        elif found[name] != shape:
            problems.append(f"{name} has the wrong shape: expected {list(shape)}, found {list(found[name])}")
    problems += [f"{name} is unexpected: found {list(shape)}" for name, shape in found.items() if name not in expected]
    if problems:
        rest = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        lines = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN])
        raise CheckpointError(f"the weights in {where} are not what its configuration describes:{lines}{rest}")


def require_finite(stored: StoredTensor, tensor: Tensor) -> None:
    """Refuse NaN and infinity, which would spoil every output.

    Raises:
        CheckpointError: names the tensor and counts the values.
    """
    # A sum is one pass without a temporary as large as the tensor; NaN and infinity both survive it.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and (bad := int((~torch.isfinite(tensor)).sum())):
        raise CheckpointError(
            f"{stored.file}: tensor {stored.key} must be finite; found {bad:,} NaN or infinite values of "
            f"{tensor.numel():,} (as {tensor.dtype})"
        )


def read_tensors(weights: WeightFiles) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Every tensor in name order, on the CPU, each in its own memory; none is kept here."""
    for stored in weights.tensors.values():
        yield stored, read_tensor(stored)


def read_tensor(stored: StoredTensor) -> Tensor:
    """One tensor, on the CPU, in its own memory."""
    tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    # NumPy has no bfloat16; bytes it has.
    stored.read_into(tensor.view(-1).view(torch.uint8).numpy().data)
    return tensor
