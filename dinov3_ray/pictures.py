"""Feature maps as pictures: the three directions in which a map varies most, as red, green and blue.

Shapes: D channels, h × w patches.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov3_ray.errors import ConfigError, InputError

__all__ = ["PcaBasis", "make_out_folder", "save_grid"]

_CLIP = 0.01
_PANEL_INCHES = 3.2
_DPI = 150


@dataclass(frozen=True, eq=False)
class PcaBasis:
    """Three principal directions, and the range of colours along each.

    In the basis of the teacher's map, equal colours in the teacher's and the student's pictures mean equal features.

    Attributes:
        mean: float64 [D].
        directions: float64 [D, 3].
        low, high: float64 [3], the values shown as 0 and as 255 along each direction.
    """

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, map_Dhw: Tensor) -> PcaBasis:
        """The principal directions of a map [D, h, w], or of maps [B, D, h, w] together.

        The largest weight of each direction is positive, so that colours are the same in every run. The range of
        colours leaves out 1% of the values at either end, which would darken all others.

        Raises:
            InputError: not such a map, not finite, or fewer than 2 patches.
        """
        tokens_ND = _tokens(map_Dhw)
        if len(tokens_ND) < 2:
            raise InputError(f"map must have at least 2 patches to find directions in; got shape {list(map_Dhw.shape)}")
        mean_D = tokens_ND.mean(dim=0)
        _, _, rows = torch.linalg.svd(tokens_ND - mean_D, full_matrices=False)
        directions_D3 = torch.zeros(tokens_ND.shape[1], 3, dtype=torch.float64)
        count = min(3, len(rows))
        directions_D3[:, :count] = rows[:count].T
        strongest = directions_D3.abs().argmax(dim=0, keepdim=True)
        directions_D3 = directions_D3 * directions_D3.gather(0, strongest).sign()
        projected_N3 = (tokens_ND - mean_D) @ directions_D3
        low_3, high_3 = torch.quantile(projected_N3, torch.tensor([_CLIP, 1 - _CLIP], dtype=torch.float64), dim=0)
        return cls(mean_D, directions_D3, low_3, high_3)

    def rgb(self, map_Dhw: Tensor) -> np.ndarray:
        """A map [D, h, w] as uint8 [h, w, 3].

        Raises:
            InputError: not a map of this basis's D.
        """
        if map_Dhw.ndim != 3 or map_Dhw.shape[0] != len(self.mean):
            raise InputError(f"map must be [{len(self.mean)}, h, w] for this basis; got shape {list(map_Dhw.shape)}")
        projected_N3 = (_tokens(map_Dhw) - self.mean) @ self.directions
        # A direction without variation is shown as mid-grey: its division would show noise.
        span_3 = self.high - self.low
        flat_3 = span_3 <= 1e-9 * (self.high.abs() + self.low.abs() + self.mean.abs().amax() + 1e-30)
        scaled_N3 = torch.where(flat_3, 0.5, (projected_N3 - self.low) / torch.where(flat_3, 1.0, span_3))
        pixels = (scaled_N3.clamp(0, 1) * 255).round().to(torch.uint8)
        picture: np.ndarray = pixels.reshape(*map_Dhw.shape[1:], 3).numpy()
        return picture


def save_grid(
    rows: Sequence[Sequence[np.ndarray]], path: str | PathLike[str], titles: Sequence[str] = (), *, heading: str = ""
) -> Path:
    """Save rows of pictures side by side, such as image | teacher's map | student's map.

    All panels of a row have the shape of its first picture; maps are enlarged patch by patch, without smoothing.

    Args:
        rows: uint8 pictures [H, W, 3] of any sizes; as many in each row.
        path: its suffix says the format; .png if there is none.
        titles: one per column.

    Raises:
        InputError: no pictures, rows of different lengths, titles for another number of columns, or a path that cannot
            be written.
    """
    # Imported here, since it takes most of a second. A Figure without pyplot needs no display.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths:
        raise InputError(f"rows must hold equally many pictures, at least one; got {[len(row) for row in rows]}")
    columns = widths.pop()
    if titles and len(titles) != columns:
        raise InputError(f"titles must name each of the {columns} columns; got {list(titles)}")
    heights = [_PANEL_INCHES * row[0].shape[0] / row[0].shape[1] for row in rows]
    top = 0.3 * bool(titles) + 0.35 * bool(heading)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(_PANEL_INCHES * columns, sum(heights) + top), dpi=_DPI, layout=layout)
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for row_axes, row in zip(axes, rows, strict=True):
        extent = (0, row[0].shape[1], row[0].shape[0], 0)
        for axis, picture in zip(row_axes, row, strict=True):
            enlarged = picture.shape[0] < row[0].shape[0]
            axis.imshow(picture, extent=extent, interpolation="nearest" if enlarged else "antialiased")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=11, pad=4)
    if heading:
        figure.suptitle(heading, fontsize=12)
    target = Path(path)
    target = target if target.suffix else target.with_suffix(".png")
    try:
        figure.savefig(target, facecolor="white")
    except (OSError, ValueError) as error:  # no such folder, or none of the formats that there are
        raise InputError(f"path must be that of a picture that can be written; got {target}: {error}") from error
    return target


def _tokens(maps: Tensor) -> Tensor:
    """[D, h, w] or [B, D, h, w] as float64 [N, D] on the CPU; in float32, directions of nearly equal weight blur."""
    if maps.ndim not in (3, 4):
        raise InputError(f"map must be [D, h, w] or [B, D, h, w]; got shape {list(maps.shape)}")
    tokens_ND = maps.detach().to("cpu", torch.float64).movedim(-3, -1).reshape(-1, maps.shape[-3])
    if not torch.isfinite(tokens_ND).all():
        raise InputError("map must be finite; it holds NaN or infinity")
    return tokens_ND


def make_out_folder(out: Path) -> None:
    """Make the folder for a command's pictures before its work starts, so that it learns early if it cannot be written.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out must be a folder that can be written; got {out} ({error.strerror})") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise ConfigError(f"--out must be a folder that can be written; this user may not write to {out}")
