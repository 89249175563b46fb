"""The images that callers may pass: checked, brought to one form, and examined for pixels in a wrong range.

Shapes: B images, 3 channels (RGB), height H, width W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov3_ray.errors import InputError

__all__ = ["ImageBatch", "Images", "find_pixel_fault"]

Images = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]
"""A float batch [B,3,H,W] or image [3,H,W] in [0,1], uint8 in 0..255, or a sequence of [3,H_i,W_i]; torch or NumPy."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_NEGATIVE = -0.5
"""Resampling and noise leave values a little below 0. Normalised pixels reach this at 35% of full brightness."""

_BRIGHT = 16.0  # floats above this are not in [0, 1], however they were augmented
_DARK = 1.005 / 255  # one of 255 steps, rounded in bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch:
    """A checked batch of RGB images: one stacked tensor [B,3,H,W], or a list of [3,H_i,W_i] of different sizes.

    The tensors share the caller's memory.
    """

    stacked: Tensor | None
    ragged: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, images: Images | ImageBatch, *, min_side: int = 1) -> ImageBatch:
        """Check ``images`` and bring them to one form.

        Args:
            images: see :data:`Images`; a batch that was checked before passes unchanged.
            min_side: the smallest height and width allowed, in pixels; see :func:`dinov3_ray.teacher.least_side`.

        Raises:
            InputError: the images break a rule; the message names it, and the value.
        """
        if isinstance(images, ImageBatch):
            batch = images
        elif isinstance(images, (Tensor, np.ndarray)):
            tensor = _as_tensor(images, "images")
            if tensor.ndim not in (3, 4):
                raise InputError(
                    f"images must be [B,3,H,W] or [3,H,W], or a sequence of [3,H,W]; got shape {list(tensor.shape)}"
                )
            _check(tensor, "images", min_side)  # here too, so that the message shows the shape as it was given
            batch = cls(stacked=tensor if tensor.ndim == 4 else tensor.unsqueeze(0))
        elif isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
            batch = cls._of_sequence(images)
        else:
            raise InputError(
                "images must be a torch tensor, a NumPy array or a sequence of them; "
                f"got {type(images).__name__} (turn a PIL image into one with np.asarray(image).transpose(2, 0, 1))"
            )
        for index, tensor in enumerate(batch.tensors):
            _check(tensor, "images" if batch.stacked is not None else f"images[{index}]", min_side)
        if len(batch) == 0:
            raise InputError("images must hold at least one image; got an empty batch")
        return batch

    @classmethod
    def _of_sequence(cls, images: Sequence[Tensor] | Sequence[np.ndarray]) -> ImageBatch:
        tensors = tuple(_as_tensor(image, f"images[{index}]") for index, image in enumerate(images))
        if not tensors:
            raise InputError("images must hold at least one image; got an empty sequence")
        for index, tensor in enumerate(tensors):
            if tensor.ndim != 3:
                raise InputError(
                    f"images[{index}] must be [3,H,W] when images is a sequence; got shape {list(tensor.shape)}"
                )
            if tensor.dtype != tensors[0].dtype:
                raise InputError(
                    "images of one sequence must share a dtype: "
                    f"images[0] is {tensors[0].dtype}, images[{index}] is {tensor.dtype}"
                )
        return cls(stacked=None, ragged=tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The one stacked tensor, or the images one by one."""
        return self.ragged if self.stacked is None else (self.stacked,)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of the one stacked tensor, or of the images one by one."""
        return [(tensor.shape[-2], tensor.shape[-1]) for tensor in self.tensors]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def __len__(self) -> int:
        return len(self.ragged) if self.stacked is None else self.stacked.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        """The images one by one, [3,H_i,W_i]."""
        return iter(self.ragged if self.stacked is None else self.stacked.unbind(0))

    def rows(self, start: int, stop: int) -> ImageBatch:
        """Images ``start`` to ``stop`` (exclusive), without a copy."""
        if self.stacked is None:
            return ImageBatch(stacked=None, ragged=self.ragged[start:stop])
        return ImageBatch(stacked=self.stacked[start:stop])


def _as_tensor(image: object, name: str) -> Tensor:
    if isinstance(image, Tensor):
        return image.detach()
    if not isinstance(image, np.ndarray):
        raise InputError(f"{name} must be a torch tensor or a NumPy array; got {type(image).__name__}")
    if image.dtype.kind not in "biuf" or image.dtype.itemsize > 8:
        raise InputError(f"{name} must be uint8 or floating point; got NumPy dtype {image.dtype}")
    # torch refuses negative strides and foreign byte order, and would share read-only memory as writable.
    if any(stride < 0 for stride in image.strides) or not image.dtype.isnative or not image.flags.writeable:
        image = np.array(image, dtype=image.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(image)


def _check(tensor: Tensor, name: str, min_side: int) -> None:
    shape = list(tensor.shape)
    if tensor.dtype != torch.uint8 and tensor.dtype not in _FLOATS:
        raise InputError(
            f"{name} must be uint8 (0..255) or floating point (0..1); got {tensor.dtype} "
            "(convert with .to(torch.uint8) or .float() / 255)"
        )
    if shape[-3] != 3:
        hint = " (channels last? permute to [..., 3, H, W])" if shape[-1] == 3 else ""
        raise InputError(f"{name} must have 3 channels (RGB) in dimension -3; got shape {shape}{hint}")
    if min(shape[-2:]) < min_side:
        least = f"{min_side} pixels high and wide (one patch of the model's input)"
        raise InputError(f"{name} must be at least {least}; got shape {shape}")


def find_pixel_fault(images: Sequence[Tensor]) -> str | None:
    """Why the values of ``images`` cannot be what a teacher expects, and the remedy; None if nothing is certain.

    Args:
        images: [B,3,H,W] or [3,H,W] each, of one dtype; every image is looked at. On an accelerator this waits for it.
    """
    each_3HW = [image for tensor in images for image in (tensor if tensor.ndim == 4 else tensor[None])]
    device = each_3HW[0].device
    # One copy to the host, and so one wait.
    ranges = torch.stack([torch.stack(torch.aminmax(image)).to(device) for image in each_3HW]).tolist()
    if images[0].dtype == torch.uint8:
        highest = [high for _, high in ranges]
        # One image may well be black, but none has its pixels in the two darkest of 256 steps, some in each.
        if 1 in highest or not any(highest):
            seen = "one reaches 1 only" if any(highest) else "all of these are black"
            return (
                f"uint8 images are expected in 0..255, but {seen}: if they were in [0, 1], multiply them by 255 before "
                "they become uint8"
            )
        return None
    for image, (low, high) in zip(each_3HW, ranges, strict=True):
        if low < _NEGATIVE:
            if not _is_noise(image.float()):
                return (
                    f"float images are expected in [0, 1], but one reaches from {low:.3g} to {high:.3g}, as if it were "
                    "normalised already: pass images as they are before Normalize, in [0, 1] or uint8, since the "
                    "teacher subtracts mean and divides by std itself (images in [-1, 1]: pass (x + 1) / 2)"
                )
        elif high > _BRIGHT:
            remedy = "divide by 255, or pass uint8" if high < 256 else "divide by the largest value that they can have"
            return f"float images are expected in [0, 1], but one reaches {high:.0f}: {remedy}"
        elif 0 < high <= _DARK:
            return f"float images are expected in [0, 1], but one reaches {high:.2g} only: divide by 255 once"
    return None


def _is_noise(image_3HW: Tensor) -> bool:
    """Whether an image is torch.randn, as in a first try of a model: neighbours differ as any two pixels do."""
    std, mean = torch.std_mean(image_3HW)
    steps = (image_3HW[..., 1:] - image_3HW[..., :-1]).abs().mean()
    # Of a normal distribution: no bias, tails on both sides, and a mean step of 1.13 std.
    tails = torch.minimum(image_3HW.amax(), -image_3HW.amin()) > 2.5 * std
    return bool((mean.abs() < 0.1 * std) & tails & (steps > std))
