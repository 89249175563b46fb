"""Features with random values, and whether two are the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov3_ray.features import Features


def random_features(
    rows: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    order: torch.memory_format = torch.contiguous_format,
) -> Features:
    """D=8, maps of 4x6, two registers, the layers 5 and -1; maps in the memory order ``order``."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        tensor = torch.randn(rows, *shape, generator=generator).to(dtype)
        return tensor.clone(memory_format=order) if tensor.ndim == 4 else tensor

    return Features(make(8), make(8, 4, 6), make(2, 8), {5: make(8, 4, 6), -1: make(8, 4, 6)}, "weights")


def same(left: Features, right: Features) -> bool:
    """Whether both hold the same results: names, dtypes and values."""
    pairs = list(zip(left.named(), right.named(), strict=True))
    return all(a[0] == b[0] and a[1].dtype == b[1].dtype and torch.equal(a[1], b[1]) for a, b in pairs)
