"""The augmented views of pictures that the demonstration's student is trained on.

Shapes: B views, 3 channels (RGB), height H, width W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dinov3_ray.distillation.augmentation import Augmentation

__all__ = ["Views"]


class Views:
    """A loader of ``steps`` batches of randomly cropped, mirrored and recoloured pictures.

    Every pass over it gives the same batches: they depend on the seed alone.

    Args:
        pictures: uint8 [3,H_i,W_i].
        size: (H, W) of the views.
        batch: B.
        steps: batches per pass.
        seed: of the order of the pictures and of their augmentation.
    """

    def __init__(self, pictures: Sequence[Tensor], size: tuple[int, int], *, batch: int, steps: int, seed: int) -> None:
        self._pictures, self._augment = pictures, Augmentation(size)
        self._batch, self._steps, self._seed = batch, steps, seed

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Tensor]:
        """Yield one uint8 tensor [B,3,H,W] per step."""
        generator = torch.Generator().manual_seed(self._seed)
        order: list[int] = []
        for _ in range(self._steps):
            while len(order) < self._batch:
                order += torch.randperm(len(self._pictures), generator=generator).tolist()
            chosen, order = order[: self._batch], order[self._batch :]
            yield torch.stack([self._augment(self._pictures[index], generator) for index in chosen])
