"""The augmented views of pictures that the demonstration's student is trained on.

Shapes: B views, 3 channels (RGB), height H, width W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Views", "crop_centre"]

_SMALLEST_CROP = 0.35  # of a picture's area
_BRIGHTNESS = 0.2
_CONTRAST = 0.2
_SATURATION = 0.3


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
        self._pictures, self._size = pictures, size
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
            yield torch.stack([self._view(self._pictures[index], generator) for index in chosen])

    def _view(self, picture_3HW: Tensor, generator: torch.Generator) -> Tensor:
        area, down, right, mirror, *colours = torch.rand(7, generator=generator).tolist()
        share = (_SMALLEST_CROP + (1 - _SMALLEST_CROP) * area) ** 0.5
        cropped = _crop(picture_3HW, self._size, share, down, right)
        view = _resize(cropped, self._size)
        if mirror < 0.5:
            view = view.flip(-1)
        brightness, contrast, saturation = (
            1 + strength * (2 * colour - 1)
            for strength, colour in zip((_BRIGHTNESS, _CONTRAST, _SATURATION), colours, strict=True)
        )
        return _recolour(view, brightness, contrast, saturation).round().clamp(0, 255).to(torch.uint8)


def crop_centre(picture_3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest central crop with the aspect ratio of ``size``, resized to ``size``: uint8 [3,H,W]."""
    view = _resize(_crop(picture_3HW, size, 1.0, 0.5, 0.5), size)
    return view.round().clamp(0, 255).to(torch.uint8)


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
