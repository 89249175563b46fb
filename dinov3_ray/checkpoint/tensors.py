"""Reads stored tensors as torch tensors, compares them with what an architecture says, and looks for NaN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dinov3_ray.config.weights import StoredTensor, WeightFiles
from dinov3_ray.errors import CheckpointError

__all__ = ["DTYPES", "check_shapes", "mismatch", "read_tensor", "read_tensors", "require_finite"]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in a safetensors header."""

_SHOWN = 12  # complaints; a wrong variant breaks hundreds of tensors in the same way


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
        raise mismatch(where, problems)


def mismatch(where: str, problems: Sequence[str]) -> CheckpointError:
    """The error for weights in ``where`` that are not those of their configuration: one line a tensor, a dozen."""
    rest = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    lines = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN])
    return CheckpointError(f"the weights in {where} are not what its configuration describes:{lines}{rest}")


def require_finite(where: object, name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity, which would spoil every output.

    Args:
        where: the file or the directory of the tensor.
        name: the tensor's.
        tensor: as it was loaded.

    Raises:
        CheckpointError: names the tensor and counts the values.
    """
    # A sum is one pass without a temporary as large as the tensor; NaN and infinity both survive it.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and (bad := int((~torch.isfinite(tensor)).sum())):
        raise CheckpointError(
            f"{where}: tensor {name} must be finite; found {bad:,} NaN or infinite values of "
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
