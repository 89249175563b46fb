"""The student of the demonstration, a small convolutional network, and the augmented views that it is trained on.

Shapes: B views, 3 channels (RGB), height H, width W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dinov3_ray.distillation.augmentation import Augmentation

__all__ = ["STRIDE", "Student", "Views"]


STRIDE = 16
"""Pixels per cell of the student's map, each way."""


class Student(nn.Module):
    """Images to a map [B, D, H/16, W/16]: a stem of stride 4, two halvings, residual blocks, and a linear head.

    Args:
        teacher_channels: D.
        channels: of the map that the head gets.
        blocks: the number of residual blocks on the final grid.
    """

    def __init__(self, teacher_channels: int, *, channels: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _convolution(3, channels // 4, kernel=4, stride=4),
            _convolution(channels // 4, channels // 2, kernel=2, stride=2),
            _convolution(channels // 2, channels, kernel=2, stride=2),
        )
        self.blocks = nn.Sequential(*(_Block(channels) for _ in range(blocks)))
        self.head = nn.Conv2d(channels, teacher_channels, 1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Map uint8 images in 0..255. Pixels beyond the last whole cell are dropped, as the teacher does."""
        height, width = (side // STRIDE * STRIDE for side in images_B3HW.shape[-2:])
        centred = images_B3HW[..., :height, :width].float().div(127.5).sub(1)
        map_BDhw: Tensor = self.head(self.blocks(self.stem(centred)))
        return map_BDhw


class _Block(nn.Module):
    """A depthwise and a pointwise convolution, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
        )

    def forward(self, map_BChw: Tensor) -> Tensor:
        return map_BChw + self.body(map_BChw)  # type: ignore[no-any-return]


def _convolution(inner: int, outer: int, *, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, kernel, stride, bias=False), nn.BatchNorm2d(outer), nn.GELU())


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
