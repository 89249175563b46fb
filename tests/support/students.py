"""Small students for distillation, as a user's own module would return them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["classifier", "nothing", "pyramid", "small"]


def small() -> nn.Module:
    """A map of stride 16; normalisation and dropout, whose state and random numbers a resumed run must have."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(16, 24, 4, 4)
    )


class _Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.body = nn.Conv2d(8, 16, 2, 2)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        fine = self.stem(images_B3HW)
        body = self.body(fine)
        return {"coarse": self.norm(body), "fine": fine}


def pyramid() -> nn.Module:
    """Maps of strides 16 and 8 in a dict, the coarser first."""
    return _Pyramid()


def classifier() -> nn.Module:
    """Logits, and no map."""
    return nn.Sequential(nn.Conv2d(3, 16, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def nothing() -> Any:
    return torch.zeros(1)
