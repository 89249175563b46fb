"""Small students for distillation, as a user's own module would return them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HALT", "classifier", "fails", "halting", "nothing", "pyramid", "sized", "small"]

HALT = "DISTILL_TEST_HALT"
"""``STEP:FOLDER``: in that step of its process, a halting student makes FOLDER/there, and waits for FOLDER/go."""


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


class _Halting(_Pyramid):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.1)
        self.steps = 0

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        if self.training and HALT in os.environ:
            self.steps += 1
            step, folder = os.environ[HALT].split(":")
            if self.steps == int(step):
                Path(folder, "there").touch()
                while not Path(folder, "go").exists():
                    time.sleep(0.01)
        return super().forward(self.drop(images_B3HW))


def halting() -> nn.Module:
    """A pyramid with dropout, which can be met in the middle of a step; see :data:`HALT`."""
    return _Halting()


def classifier() -> nn.Module:
    """Logits, and no map."""
    return nn.Sequential(nn.Conv2d(3, 16, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def nothing() -> Any:
    return torch.zeros(1)


def fails() -> nn.Module:
    raise OSError("no such weights\nhere")


def sized(width: int) -> nn.Module:
    return nn.Conv2d(3, width, 16, 16)
