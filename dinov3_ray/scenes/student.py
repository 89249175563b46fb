"""A student: a small convolutional network that has its teacher's grid.

Shapes: B images, 3 channels (RGB), height H, width W, D teacher channels, C channels of its own, a grid of h × w cells.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["STRIDE", "Student"]


STRIDE = 16
"""Pixels per cell of the student's map, each way."""


class Student(nn.Module):
    """Images to a map [B, D, H/16, W/16]: a stem of stride 4, two halvings, residual blocks, and a linear head.

    Args:
        teacher_channels: D.
        channels: C, of the map that the head gets.
        blocks: the number of residual blocks on the final grid.
    """

    def __init__(self, teacher_channels: int, *, channels: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.channels = channels
        self.stem = nn.Sequential(
            _convolution(3, channels // 4, kernel=4, stride=4),
            _convolution(channels // 4, channels // 2, kernel=2, stride=2),
            _convolution(channels // 2, channels, kernel=2, stride=2),
        )
        self.blocks = nn.Sequential(*(_Block(channels) for _ in range(blocks)))
        self.head = nn.Conv2d(channels, teacher_channels, 1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Map uint8 images in 0..255. Pixels beyond the last whole cell are dropped, as the teacher does."""
        map_BDhw: Tensor = self.head(self.features(images_B3HW))
        return map_BDhw

    def features(self, images_B3HW: Tensor) -> Tensor:
        """The map [B,C,h,w] that the head gets: what stays of the student when the head is taken off."""
        height, width = (side // STRIDE * STRIDE for side in images_B3HW.shape[-2:])
        centred = images_B3HW[..., :height, :width].float().div(127.5).sub(1)
        map_BChw: Tensor = self.blocks(self.stem(centred))
        return map_BChw


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
