"""The channel statistics of the published checkpoints, for writing a preprocessor_config.json that has none yet."""

from __future__ import annotations

from dinov3_ray.errors import ConfigError
from dinov3_ray.jsonfields import is_positive_int
from dinov3_ray.preprocessing import Preprocessing

__all__ = ["IMAGENET", "SAT493M", "STATISTICS", "preprocessing_for"]

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""(mean, std) of R, G and B in [0, 1]"""

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of everything trained on LVD-1689M."""

SAT493M: Statistics = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
"""Of the satellite models, ViT-L and ViT-7B."""

STATISTICS: dict[str, Statistics] = {"lvd1689m": IMAGENET, "sat493m": SAT493M}
"""By the name of the training set, as checkpoint files are named."""


def preprocessing_for(statistics: Statistics, image_size: int | tuple[int, int], patch_size: int) -> Preprocessing:
    """The rule of the published models: rescale by 1/255, resize to ``image_size``, normalize.

    Raises:
        ConfigError: ``image_size`` is no size, or smaller than a patch.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(is_positive_int(side) for side in size) or min(size) < patch_size:
        raise ConfigError(f"image_size must be an integer or a pair (h, w), >= {patch_size} each; got {image_size!r}")
    return Preprocessing((size[0], size[1]), None, None, 1 / 255, *statistics, (size[0], size[1]))
