"""Batches that tell themselves apart, for tests of prefetching. Light to import: DataLoader workers do it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

Item = tuple[int, tuple[int, int]]


def picture(index: int, size: tuple[int, int]) -> Tensor:
    """uint8 [3,H,W]; no two indices give the same, nor do two sizes."""
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))


def numbered(number: int, rows: int = 2, size: tuple[int, int] = (32, 48)) -> Tensor:
    """uint8 [rows,3,H,W], ``number`` in every pixel."""
    return torch.full((rows, 3, *size), number % 256, dtype=torch.uint8)


class Pictures(Dataset[dict[str, Tensor]]):
    """Asked for (index, size), since a batch has one size and the next another."""

    def __getitem__(self, item: Item) -> dict[str, Tensor]:
        index, size = item
        return {"img": picture(index, size), "index": torch.tensor(index)}


class VariedBatches:
    """A batch sampler over ``images`` indices: shuffled anew each epoch, 1 to 4 images per batch, of a random size."""

    def __init__(self, images: int, seed: int = 0) -> None:
        self._images = images
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[Item]]:
        order = torch.randperm(self._images, generator=self._generator).tolist()
        while order:
            rows, height, width = (int(torch.randint(1, 5, (), generator=self._generator)) for _ in range(3))
            chosen, order = order[:rows], order[rows:]
            yield [(index, (16 * height, 16 * width)) for index in chosen]
