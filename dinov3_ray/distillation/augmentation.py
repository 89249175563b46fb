"""Augmented views of pictures: a random crop, mirrored or not, and recoloured.

Shapes: 3 channels (RGB), height H, width W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Augmentation", "crop_centre"]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Makes a view of a picture, by what a random generator draws and nothing else.

    Args:
        size: (H, W) of the views.
        smallest_crop: the least share of the largest crop's area, 0 to 1.
        brightness, contrast, saturation: each factor lies between 1 minus this and 1 plus it.
    """

    size: tuple[int, int]
    smallest_crop: float = 0.35
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.3

    def __call__(self, picture_3HW: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [3,H_i,W_i] to uint8 [3,H,W]."""
        area, down, right, mirror, *colours = torch.rand(7, generator=generator).tolist()
        share = (self.smallest_crop + (1 - self.smallest_crop) * area) ** 0.5
        view = _resize(_crop(picture_3HW, self.size, share, down, right), self.size)
        if mirror < 0.5:
            view = view.flip(-1)
        strengths = (self.brightness, self.contrast, self.saturation)
        factors = (1 + strength * (2 * colour - 1) for strength, colour in zip(strengths, colours, strict=True))
        return _as_uint8(_recolour(view, *factors))


def crop_centre(picture_3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest central crop with the aspect ratio of ``size``, resized to ``size``: uint8 [3,H,W]."""
    return _as_uint8(_resize(_crop(picture_3HW, size, 1.0, 0.5, 0.5), size))


def _crop(picture_3HW: Tensor, size: tuple[int, int], share: float, down: float, right: float) -> Tensor:
    """A crop with the aspect ratio of ``size``.

    Each side has ``share`` of the largest such crop's; ``down`` and ``right`` (0 to 1) place it.
    """
    full_height, full_width = picture_3HW.shape[-2:]
    scale = share * min(full_height / size[0], full_width / size[1])
    height, width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = round(down * (full_height - height)), round(right * (full_width - width))
    return picture_3HW[:, top : top + height, left : left + width]


def _resize(picture_3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize to ``size``, as float32 in 0..255."""
    return F.interpolate(picture_3HW[None].float(), size=size, mode="bilinear", antialias=True)[0]


def _recolour(view_3HW: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    bright = view_3HW * brightness
    contrasted = (bright - bright.mean()) * contrast + bright.mean()
    grey_1HW = contrasted.mean(0, keepdim=True)
    return (contrasted - grey_1HW) * saturation + grey_1HW


def _as_uint8(view_3HW: Tensor) -> Tensor:
    return view_3HW.round().clamp(0, 255).to(torch.uint8)
