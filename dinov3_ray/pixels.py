"""Pixel conventions that pass for the right one: what an image's values show, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["find_pixel_fault"]

_NEGATIVE = -0.5
"""Resampling and noise leave values a little below 0. Normalised pixels reach this at 35% of full brightness."""

_BRIGHT = 16.0  # floats above this are not in [0, 1], however they were augmented
_DARK = 1.005 / 255  # one of 255 steps, rounded in bfloat16


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
