"""Feature maps as pictures: principal components as colours, and labelled grids of pictures.

Shapes: B images, D channels, h × w locations, N = B·h·w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from dinov3_ray.errors import ConfigError, InputError

__all__ = ["PcaBasis", "save_grid"]

_COLOURS = 3
_TAIL = 0.01  # of the locations, at either end of a component, that may be clipped to the darkest or brightest


@dataclass(frozen=True, slots=True, eq=False)
class PcaBasis:
    """Three directions in feature space as red, green and blue.

    Fitted on one map and applied to others, so that equal colours mean equal features: a student's map shown in its
    teacher's basis. Only the direction of a feature counts, as in a cosine; its length does not.

    Attributes:
        mean: [D], of the features that the basis was fitted on, each at unit length.
        components: [D, 3], orthonormal, by falling variance.
        low, high: [3], the projections that become 0 and 255.
    """

    mean: Tensor
    components: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, map_BDhw: Tensor) -> Self:
        """The basis of the three directions in which the features of ``map_BDhw`` (any floating dtype) vary most.

        Raises:
            InputError: it is no map, has fewer than 3 channels, or values that are not finite.
        """
        features_ND = _unit_features(map_BDhw)
        if min(features_ND.shape) < _COLOURS:
            raise InputError(
                f"a map must have at least {_COLOURS} channels and as many locations to be shown in colours; "
                f"got {list(map_BDhw.shape)}"
            )
        mean_D = features_ND.mean(0)
        centred_ND = features_ND - mean_D
        # float64: the small differences of a near-constant map are all there is to see of it.
        _, vectors_DD = torch.linalg.eigh((centred_ND.T @ centred_ND).double())  # by rising eigenvalue
        components_D3 = vectors_DD[:, -_COLOURS:].flip(1).float()
        # An eigenvector's sign is arbitrary; this choice makes a picture the same on every machine.
        largest_3 = components_D3.abs().argmax(0)
        components_D3 = components_D3 * components_D3[largest_3, torch.arange(_COLOURS)].sign()
        projected_N3 = (centred_ND @ components_D3).sort(0).values
        tail = int(_TAIL * (len(projected_N3) - 1))
        return cls(mean_D, components_D3, projected_N3[tail], projected_N3[-1 - tail])

    def rgb(self, map_BDhw: Tensor) -> Tensor:
        """``map_BDhw`` in the colours of this basis: uint8 [B,3,h,w].

        Raises:
            InputError: it is no map of as many channels as the basis, or has values that are not finite.
        """
        features_ND = _unit_features(map_BDhw)
        if features_ND.shape[1] != len(self.mean):
            raise InputError(f"the map must have the basis' {len(self.mean)} channels; got {list(map_BDhw.shape)}")
        projected_N3 = (features_ND - self.mean) @ self.components
        span_3 = (self.high - self.low).clamp_min(torch.finfo(torch.float32).tiny)
        colours_N3 = ((projected_N3 - self.low) / span_3).clamp(0, 1).mul(255).round().to(torch.uint8)
        batch, _, height, width = map_BDhw.shape
        return colours_N3.view(batch, height, width, _COLOURS).permute(0, 3, 1, 2).contiguous()


def _unit_features(map_BDhw: Tensor) -> Tensor:
    """[N, D], float32, each of unit length."""
    if map_BDhw.ndim != 4 or not map_BDhw.is_floating_point():
        raise InputError(
            f"a map must be a floating-point tensor [B,D,h,w]; got {map_BDhw.dtype} {list(map_BDhw.shape)}"
        )
    features_ND = map_BDhw.detach().float().cpu().permute(0, 2, 3, 1).flatten(0, 2)
    if not features_ND.isfinite().all():
        raise InputError("a map must be finite to be shown in colours; it holds NaN or infinity")
    return F.normalize(features_ND, dim=1)


def save_grid(
    path: str | PathLike[str], columns: Mapping[str, Sequence[Tensor]], *, cell: float = 2.2, smooth: bool = False
) -> Path:
    """Write a grid of pictures to ``path``: a column for each name, a row for each place in the columns.

    Args:
        path: of a PNG file (or another kind that matplotlib writes).
        columns: by their titles, pictures uint8 [3,H,W]; of any sizes, but one row's should have one shape.
        cell: inches a picture; a file has 100 pixels an inch.
        smooth: interpolate pictures smaller than their cell, in place of showing their pixels as squares.

    Raises:
        ConfigError: the columns are empty or of different lengths.
    """
    counts = {len(pictures) for pictures in columns.values()}
    if len(counts) != 1 or counts == {0}:
        raise ConfigError(
            "columns must be at least one, all with as many pictures, at least one; got "
            f"{ {title: len(pictures) for title, pictures in columns.items()} }"
        )
    rows = counts.pop()
    # A Figure of its own, not pyplot's: no window system is looked for, and nothing stays behind in this process.
    figure = Figure(figsize=(cell * len(columns), cell * rows + 0.35), dpi=100)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01))
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0][column].set_title(title, fontsize=11)
        for row, picture_3HW in enumerate(pictures):
            axes[row][column].imshow(
                picture_3HW.permute(1, 2, 0).numpy(), interpolation="bicubic" if smooth else "nearest"
            )
            axes[row][column].set_axis_off()
    figure.savefig(path)
    return Path(path)
