"""The learning rate of a training whose end is known."""

from __future__ import annotations

import math

__all__ = ["rate_factor"]

_RISE = 0.1


def rate_factor(progress: float) -> float:
    """The factor of the learning rate at ``progress`` (0 to 1): it rises for a tenth, then falls to 0 as a cosine."""
    if progress < _RISE:
        return 0.1 + 0.9 * progress / _RISE
    return 0.5 * (1 + math.cos(math.pi * (min(progress, 1.0) - _RISE) / (1 - _RISE)))
