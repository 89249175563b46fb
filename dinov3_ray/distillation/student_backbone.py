"""A student as distillation sees it: images in, feature maps out, whatever network is inside.

Shapes: B images, height H, width W; C channels, a grid of h × w locations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_ray.errors import ConfigError, DinoV3Error

__all__ = ["IMAGENET", "PLAIN", "StudentBackbone", "coarsest_last", "find_maps"]

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""The mean and the standard deviation of each channel, of pixels in 0..1."""

_TOLERANCE = 0.25  # of a stride: grids are rounded up or down

IMAGENET: Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN: Statistics = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


class StudentBackbone(nn.Module):
    """A network that takes uint8 images, and whose maps are outputs of layers with names of their own.

    Each map passes through an identity, ``levels.0`` and so on, the finest first: a tap finds the maps there whichever
    way the network makes them. The network's own layers are ``net.NAME``.

    Args:
        net: the network, in its own framework's form: its weights are what training gives.
        run: makes what ``net`` gives of normalised images [B,3,H,W]; its maps are found by :func:`find_maps`. None
            calls ``net``.
        statistics: by which pixels in 0..1 are normalised.
        size: (H, W) of an image, for a first look at the maps.

    Raises:
        ConfigError: the network fails on an image of this size.
    """

    def __init__(
        self,
        net: nn.Module,
        run: Callable[[Tensor], Any] | None = None,
        *,
        statistics: Statistics,
        size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.net = net
        self._run = run if run is not None else lambda pixels_B3HW: self.net(pixels_B3HW)
        self.statistics = statistics
        self.register_buffer("_statistics", torch.tensor(statistics).view(2, 3, 1, 1), persistent=False)
        self.levels = nn.ModuleList()
        self._strides: list[float] = []
        training = net.training
        try:
            with torch.no_grad():
                found = self.eval()(torch.full((1, 3, *size), 114, dtype=torch.uint8))
        except DinoV3Error:
            raise
        except Exception as error:
            raise ConfigError(
                f"student must take images [B,3,{size[0]},{size[1]}]; it raised {type(error).__name__}: {error} (see "
                "--image-size)"
            ) from error
        self.levels.extend(nn.Identity() for _ in found)
        self._strides = [size[0] / each.shape[2] for each in found]
        self.train(training)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Maps [B, C_i, h_i, w_i], the coarsest last, of uint8 images; none where the network gives no map."""
        mean_311, std_311 = self.get_buffer("_statistics")
        pixels = (images_B3HW.float() / 255 - mean_311) / std_311
        maps = coarsest_last(find_maps(self._run(pixels)))
        if not len(self.levels):
            return maps
        return [level(found) for level, found in zip(self.levels, maps, strict=True)]

    @property
    def last_level(self) -> str | None:
        """The name of the coarsest map's layer; None where the network gives no map."""
        return f"levels.{len(self.levels) - 1}" if len(self.levels) else None

    def level_of(self, stride: int) -> str | None:
        """The name of the layer of the map with about ``stride`` pixels to a location; None where there is none."""
        near = [index for index, found in enumerate(self._strides) if abs(found - stride) <= _TOLERANCE * stride]
        return f"levels.{near[-1]}" if near else None


def find_maps(output: Any) -> list[Tensor]:
    """The maps [B, C, h, w] in what a network gives: a tensor, a list, a dict, or an output of transformers."""
    if isinstance(output, Tensor):
        return [output] if output.ndim == 4 else []
    if isinstance(output, Mapping):
        # Of transformers' outputs, which are dicts too, the backbone's own choice goes first.
        chosen = output.get("feature_maps")
        return find_maps(chosen if chosen is not None else list(output.values()))
    if isinstance(output, Sequence) and not isinstance(output, (str, bytes)):
        return [found for part in output for found in find_maps(part)]
    return []


def coarsest_last(maps: Sequence[Tensor]) -> list[Tensor]:
    """Of each resolution the last map, from the finest to the coarsest."""
    by_size = {tuple(found.shape[-2:]): found for found in maps}
    return [by_size[size] for size in sorted(by_size, reverse=True)]
