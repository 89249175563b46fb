"""Where the objects are: boxes of a batch, rasterised onto the grid of a feature map.

Shapes: N boxes in B images of H × W pixels; a grid of h × w cells. Coordinates are (x, y), x to the right, y down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dinov3_ray.errors import ConfigError, InputError

__all__ = ["BoxFormat", "Boxes"]

BoxFormat = Literal["xyxy", "xywh", "xywhr", "polygon"]
"""What the columns of a box are, under Ultralytics' names.

- ``xyxy``: x1, y1, x2, y2, the left upper and the right lower corner.
- ``xywh``: cx, cy, w, h, centre and sides (DETR and its kin too).
- ``xywhr``: cx, cy, w, h, r; r in radians, from the x axis towards the y axis (clockwise on the screen). The corners
  are (cx, cy) ± w/2 · (cos r, sin r) ± h/2 · (-sin r, cos r) in pixels: normalised sides are scaled by W and H first.
- ``polygon``: x1, y1, ..., x4, y4 or [4, 2], the corners in order around, either way, as YOLO-OBB label files have
  them.
"""

_COLUMNS: dict[BoxFormat, int] = {"xyxy": 4, "xywh": 4, "xywhr": 5, "polygon": 8}
_FARTHEST = 4.0
"""A normalised coordinate may lie outside its image, but not this far, in image sides: beyond, it must be pixels."""

_HAIR = 1e-3  # of a cell: a smaller difference is rounding


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """The boxes of a batch as quadrilaterals, whatever their format was. Build it with :meth:`of`.

    Attributes:
        corners: [N, 4, 2], (x, y) of the four corners in order around, in shares of the image (0..1); float32 or
            float64.
        image_index: int64 [N], the index in the batch of the image that each box lies in.
    """

    corners: Tensor
    image_index: Tensor

    @classmethod
    def of(
        cls,
        boxes: Tensor | Sequence[Tensor],
        batch_index: Tensor | None = None,
        *,
        format: BoxFormat,
        image_size: tuple[int, int] | None = None,
        normalized: bool = True,
    ) -> Boxes:
        """Boxes from whatever a loader gives.

        Args:
            boxes: [N, columns of ``format``] of all images together, or one such tensor per image (as DETR has them; an
                image without objects has an empty one).
            batch_index: [N] or [N, 1] of any dtype, the image of each box (Ultralytics' ``batch_idx``); only with boxes
                of all images together.
            format: see :data:`BoxFormat`.
            image_size: (H, W) of the images that the student sees; needed for pixels and for ``xywhr``.
            normalized: coordinates are shares of the image (x by W, y by H) and not pixels.

        Raises:
            ConfigError: for options that contradict one another.
            InputError: for tensors of another shape; on the CPU also for pixels passed as normalised coordinates (on an
                accelerator that look would make the training loop wait).
        """
        if format not in _COLUMNS:
            raise ConfigError(f"format must be one of {', '.join(get_args(BoxFormat))}; got {format!r}")
        if image_size is None and (format == "xywhr" or not normalized):
            why = "angles hold in pixels, not in shares of the image" if normalized else "coordinates are pixels"
            raise ConfigError(f"image_size must be (H, W) for format {format!r} and normalized={normalized}: {why}")
        stacked, image_N = _gather(boxes, batch_index, format)
        values = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
        height, width = image_size or (1, 1)
        corners_N42 = _corners(values, format, (width, height) if normalized else (1, 1))
        # Divided, not multiplied by 1 / W: 320 of 640 pixels is 0.5 exactly.
        corners_N42 = torch.stack([corners_N42[..., 0] / width, corners_N42[..., 1] / height], -1)
        if normalized and corners_N42.device.type == "cpu" and corners_N42.numel():
            farthest = float(corners_N42.nan_to_num(0.0, 0.0, 0.0).abs().max())
            if farthest > _FARTHEST:
                raise InputError(
                    f"boxes must be shares of the image (0..1) with normalized=True; got a corner at {farthest:g} "
                    "(pass normalized=False and image_size=(H, W) for pixels)"
                )
        return cls(corners_N42, image_N)

    @classmethod
    def from_ultralytics(cls, batch: Mapping[str, Tensor]) -> Boxes:
        """The boxes of a batch of an Ultralytics loader, detection ([N, 4]) or OBB ([N, 5]).

        Reads ``bboxes`` (normalised xywh or xywhr), ``batch_idx`` and, for its size, ``img`` [B, 3, H, W].
        """
        missing = [key for key in ("bboxes", "batch_idx", "img") if key not in batch]
        if missing:
            raise InputError(f"an Ultralytics batch must have bboxes, batch_idx and img; {', '.join(missing)} missing")
        boxes = batch["bboxes"]
        height, width = batch["img"].shape[-2:]
        oriented = boxes.shape[-1] == _COLUMNS["xywhr"]
        return cls.of(boxes, batch["batch_idx"], format="xywhr" if oriented else "xywh", image_size=(height, width))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Boxes:
        """The same boxes on ``device``."""
        return Boxes(
            self.corners.to(device, non_blocking=non_blocking), self.image_index.to(device, non_blocking=non_blocking)
        )

    def __len__(self) -> int:
        """N."""
        return self.corners.shape[0]

    def __repr__(self) -> str:
        return f"Boxes({len(self)} on {self.corners.device})"

    def require_images(self, images: int) -> None:
        """Raise InputError if a box lies in an image that is not in 0..``images`` - 1.

        Only on the CPU: on an accelerator the question would make the training loop wait, and :meth:`mask` leaves such
        boxes out.
        """
        if self.image_index.device.type == "cpu" and len(self):
            low, high = int(self.image_index.min()), int(self.image_index.max())
            if low < 0 or high >= images:
                raise InputError(f"batch_index must lie in 0..{images - 1} for {images} images; got {low}..{high}")

    def mask(self, images: int, size: tuple[int, int]) -> Tensor:
        """Which cells of the grid show an object: bool [B, h, w], on the boxes' device.

        A cell is marked if its centre ((j + ½) / w, (i + ½) / h) lies inside a box (even-odd rule; a centre on the left
        or upper edge is inside, one on the right or lower edge is not, so that boxes side by side share no cell).
        Besides, every box marks the cell in which its own centre, the mean of its corners, lies, so that an object
        smaller than a cell does not vanish; not if that centre is outside the image. A box whose corners are all one
        point is padding and marks nothing, nor does one with a coordinate that is not finite.

        Cost: O(N·h + B·h·w), with no loop over boxes and no wait for an accelerator: each edge crosses each row of
        centres once at most, and the crossings of a row, sorted, bound the runs of cells inside (scanline fill).

        Args:
            images: B.
            size: (h, w) of the grid, which covers the whole image.

        Raises:
            InputError: see :meth:`require_images`.
        """
        height, width = size
        self.require_images(images)
        corners_N42 = self.corners * self.corners.new_tensor([width, height])  # in cells: centres at j + ½, i + ½
        counts_N = (
            corners_N42.isfinite().all(2).all(1)
            & (corners_N42 != corners_N42[:, :1]).any(2).any(1)
            & (self.image_index >= 0)
            & (self.image_index < images)
        )
        image_N = self.image_index.clamp(0, images - 1)

        # Changes [B, h, w + 1]: +1 where a run of cells starts, -1 behind its end; their running sum counts the boxes.
        changes = torch.zeros(images * height * (width + 1), dtype=torch.int32, device=self.image_index.device)
        bounds_Nh4 = _crossings(corners_N42, height, width)
        row_Nh = image_N[:, None] * height + torch.arange(height, device=image_N.device)
        at_Nh4 = row_Nh[:, :, None] * (width + 1) + bounds_Nh4
        sign_4 = 1 - 2 * (torch.arange(4, dtype=torch.int32, device=image_N.device) % 2)
        changes.index_add_(0, at_Nh4.flatten(), (counts_N[:, None, None] * sign_4).expand_as(at_Nh4).flatten())

        centre_N2 = corners_N42.mean(1)
        x_N, y_N = centre_N2.nan_to_num(0.0).unbind(1)
        own_N = counts_N & _within(x_N, width) & _within(y_N, height)
        column_N, row_N = x_N.clamp(0, width - 1).long(), y_N.clamp(0, height - 1).long()
        at_N = (image_N * height + row_N) * (width + 1) + column_N
        changes.index_add_(0, at_N, own_N.int())
        changes.index_add_(0, at_N + 1, -own_N.int())
        return changes.view(images, height, width + 1).cumsum(2, dtype=torch.int32)[:, :, :width] > 0


def _within(at_N: Tensor, cells: int) -> Tensor:
    """Whether a centre lies on the grid, ends included. The mean of corners is rounded: a little outside is inside."""
    return (at_N > -_HAIR) & (at_N < cells + _HAIR)


def _gather(
    boxes: Tensor | Sequence[Tensor],
    batch_index: Tensor | None,
    format: BoxFormat,
) -> tuple[Tensor, Tensor]:
    """All boxes as [N, columns], and the image of each, int64 [N]."""
    columns = _COLUMNS[format]
    if isinstance(boxes, Tensor):
        if batch_index is None:
            raise InputError(
                "batch_index must give the image of each box when boxes is one tensor; got None "
                "(or pass a sequence, one tensor per image)"
            )
        stacked = boxes
        image_N = batch_index.reshape(-1).to(boxes.device, torch.int64)
    else:
        if batch_index is not None:
            raise InputError("batch_index must be None when boxes is a sequence: the place in it is the image")
        if not boxes:
            raise InputError("boxes must hold one tensor per image; got an empty sequence")
        flat = [_rows(each, columns, f"boxes[{index}]", format) for index, each in enumerate(boxes)]
        stacked = torch.cat(flat)
        image_N = torch.cat([torch.full((len(each),), index, device=each.device) for index, each in enumerate(flat)])
    stacked = _rows(stacked, columns, "boxes", format)
    if len(image_N) != len(stacked):
        raise InputError(f"batch_index must have one entry per box ({len(stacked)}); got {len(image_N)}")
    return stacked, image_N


def _rows(boxes: Tensor, columns: int, name: str, format: BoxFormat) -> Tensor:
    if format == "polygon" and boxes.ndim == 3 and boxes.shape[1:] == (4, 2):
        return boxes.flatten(1)
    if boxes.numel() == 0:  # "no objects" comes as [0], [0, 4] or [0, 5], depending on the loader
        return boxes.new_zeros(0, columns)
    if boxes.ndim != 2 or boxes.shape[1] != columns:
        raise InputError(f"{name} must be [N, {columns}] for format {format!r}; got shape {list(boxes.shape)}")
    return boxes


def _times(points: Tensor, factors: tuple[float, float]) -> Tensor:
    """Points [..., 2] with x and y multiplied. By numbers: a tensor made here would have to be copied to the device."""
    x, y = points.unbind(-1)
    return torch.stack([x * factors[0], y * factors[1]], -1)


def _corners(boxes: Tensor, format: BoxFormat, factors: tuple[float, float]) -> Tensor:
    """Corners in order around, [N, 4, 2], of boxes whose lengths are multiplied by ``factors`` (x, y)."""
    if format == "polygon":
        return _times(boxes.view(-1, 4, 2), factors)
    first_N2, second_N2 = _times(boxes[:, :2], factors), _times(boxes[:, 2:4], factors)
    if format == "xyxy":
        (left, top), (right, bottom) = first_N2.unbind(1), second_N2.unbind(1)
        return torch.stack([left, top, right, top, right, bottom, left, bottom], 1).view(-1, 4, 2)
    angle_N = boxes[:, 4] if format == "xywhr" else torch.zeros_like(boxes[:, 0])
    cos_N, sin_N = angle_N.cos(), angle_N.sin()
    along_N2 = second_N2[:, :1] / 2 * torch.stack([cos_N, sin_N], 1)
    across_N2 = second_N2[:, 1:] / 2 * torch.stack([-sin_N, cos_N], 1)
    around = (-along_N2 - across_N2, along_N2 - across_N2, along_N2 + across_N2, -along_N2 + across_N2)
    return first_N2[:, None] + torch.stack(around, 1)


def _crossings(corners_N42: Tensor, height: int, width: int) -> Tensor:
    """Columns at which the runs of cells inside a box begin and end, int64 [N, h, 4], ascending, in 0..w.

    A row has two runs, [0]..[1] and [2]..[3], ends exclusive. A concave box may need both. A run that is not needed is
    empty, at 0.
    """
    start_N42, end_N42 = corners_N42, corners_N42.roll(-1, 1)
    (x0_N4, y0_N4), (x1_N4, y1_N4) = start_N42.unbind(2), end_N42.unbind(2)
    centre_h = torch.arange(height, device=corners_N42.device, dtype=corners_N42.dtype) + 0.5
    centre_h1 = centre_h[:, None]
    crosses_Nh4 = (y0_N4[:, None] > centre_h1) != (y1_N4[:, None] > centre_h1)
    # A horizontal edge crosses no row of centres: its infinite slope is never used. A vertical edge crosses exactly at
    # its x: its slope is 0.
    slope_N4 = (x1_N4 - x0_N4) / (y1_N4 - y0_N4)
    x_Nh4 = x0_N4[:, None] + (centre_h1 - y0_N4[:, None]) * slope_N4[:, None]
    # Centre j + ½ lies left of x for the first ceil(x - ½) columns.
    column_Nh4 = (x_Nh4 - 0.5).ceil().nan_to_num(0.0).clamp(0, width).long()
    return torch.where(crosses_Nh4, column_Nh4, 0).sort(2).values
