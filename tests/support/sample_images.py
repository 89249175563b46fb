"""Images that are the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor


def images_of(number: int, rows: int = 2, size: tuple[int, int] = (32, 48)) -> Tensor:
    """Batch ``number`` of random images, uint8 [rows, 3, *size]."""
    return torch.randint(0, 256, (rows, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
