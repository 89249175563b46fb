"""The golden check: fixed images, and a comparison of a teacher's fast path with plain float32.

A fast path is anything that may go wrong without an error: a narrow dtype, a fused attention kernel, a compiler, a
damaged device. (A TensorRT release once gave DINO features whose cosine to the true ones was 0.018, in float32.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ray.errors import NumericsError
from dinov3_ray.features import Features, channel_dim

__all__ = ["agreement", "golden_images"]


def golden_images(height: int, width: int) -> Tensor:
    """Two images, uint8 [2,3,H,W], the same bits on every machine: integer arithmetic, no random numbers.

    One is smooth (two gradients, and a chirp that has all frequencies), the other is full of edges.
    """
    y, x = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
    smooth = [x * 255 // width + 0 * y, y * 255 // height + 0 * x, (x * x + 2 * y * y) // 61 % 256]
    blocks = ((y // 23) * 7 + (x // 31) * 13) * 37 % 256
    edges = [blocks, (x * 5 + y * 3) % 199 + blocks // 5, (x // 9 + y // 7) % 2 * 180 + 40]
    return torch.stack([torch.stack(smooth), torch.stack(edges)]).to(torch.uint8)


def agreement(fast: Features, reference: Features, minimum: float, path: str) -> float:
    """The least cosine between the outputs of the fast path and those of the reference.

    The cosine is averaged over an image's tokens; the least of these means, over images and outputs, must reach
    ``minimum``. A mean hides a few wrong tokens, so each single token must reach ``1 - 10 * (1 - minimum)``.

    Args:
        fast, reference: the same outputs of the same images.
        minimum: the least result allowed.
        path: the fast path in words, for the message.

    Raises:
        NumericsError: a cosine is too low, or a value is not finite.
    """
    for features, whose in ((reference, "the checkpoint itself, in plain float32,"), (fast, f"the teacher ({path})")):
        broken = [name for name, tensor in features.named() if not torch.isfinite(tensor).all()]
        if broken:
            raise NumericsError(f"{whose} gives values that are not finite in {', '.join(broken)}")
    means: dict[str, float] = {}
    worst: dict[str, float] = {}
    for (name, ours), (_, theirs) in zip(fast.named(), reference.named(), strict=True):
        cosines = F.cosine_similarity(ours.float(), theirs.float(), dim=channel_dim(name)).reshape(len(ours), -1)
        means[name] = cosines.mean(dim=1).min().item()
        worst[name] = cosines.min().item()
    least, floor = min(means.values()), 1 - 10 * (1 - minimum)
    if least < minimum or min(worst.values()) < floor:
        figures = ", ".join(f"{name} {means[name]:.6f} (worst token {worst[name]:.6f})" for name in means)
        raise NumericsError(
            f"the teacher ({path}) must agree with plain float32 to a mean cosine of at least {minimum:g} and "
            f"{floor:g} for any token; got {figures}. Try dtype='float32', attention='eager' or compile=False to "
            "find what breaks it"
        )
    return least
