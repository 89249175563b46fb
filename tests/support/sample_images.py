"""Images that are the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor


def images_of(number: int, rows: int = 2) -> Tensor:
    """Batch ``number`` of random images, uint8 [rows, 3, 32, 48]."""
    return torch.randint(0, 256, (rows, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
