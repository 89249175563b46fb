"""Finding the images in whatever a loader gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from dinov3_ray.errors import ConfigError
from dinov3_ray.images import Images

__all__ = ["find_images"]

_KEYS = ("img", "images", "pixel_values")


def find_images(batch: Any) -> Images:
    """The images of a batch, by this rule:

    1. a tensor or array is the images;
    2. of a dict (or another mapping), what stands under ``img``, ``images`` or ``pixel_values``;
    3. a list or tuple of [3,H,W] tensors or arrays is images of different sizes;
    4. of any other list or tuple, the first item, by the same rule: ``(images, labels)``.

    Raises:
        ConfigError: none of them holds, or a dict has several of the names.
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch
    if isinstance(batch, Mapping):
        names = [name for name in _KEYS if name in batch]
        if len(names) == 1:
            return find_images(batch[names[0]])
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and len(batch):
        if all(isinstance(item, (Tensor, np.ndarray)) and item.ndim == 3 and item.shape[0] == 3 for item in batch):
            return cast(Images, batch)
        if not isinstance(batch[0], (Tensor, np.ndarray)) or batch[0].ndim == 4:
            return find_images(batch[0])
    raise ConfigError(
        f"images must be given where a batch is not images, (images, ...) or a dict with one of {', '.join(_KEYS)}; "
        f"this one is {_described(batch)}: pass images=lambda batch: ..., which takes them out"
    )


def _described(batch: object) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(repr, batch)) or 'nothing in it'}"
    if isinstance(batch, (list, tuple)):
        items = [f"{type(item).__name__}{list(getattr(item, 'shape', ()))}" for item in batch[:3]]
        return f"a {type(batch).__name__} of {len(batch)}: {', '.join(items)}{', ...' if len(batch) > 3 else ''}"
    return f"a {type(batch).__name__}"
