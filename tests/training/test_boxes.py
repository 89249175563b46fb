"""The masks of boxes, against a loop over boxes and cells in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.training.boxes import Boxes

Point = tuple[Fraction, Fraction]


def inside(x: Fraction, y: Fraction, corners: list[Point]) -> bool:
    """Point in polygon, the even-odd rule, one edge after the other."""
    result = False
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            result = not result
    return result


def distance_to_edges(x: float, y: float, corners: list[tuple[float, float]]) -> float:
    nearest = math.inf
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        t = 0.0 if length == 0 else min(1.0, max(0.0, ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length))
        nearest = min(nearest, math.hypot(x - x0 - t * (x1 - x0), y - y0 - t * (y1 - y0)))
    return nearest


def centre_cell(corners: list[Point], size: tuple[int, int]) -> tuple[int, int] | None:
    h, w = size
    x, y = (sum((corner[axis] for corner in corners), Fraction(0)) / 4 for axis in (0, 1))
    if len(set(corners)) == 1 or not (0 <= x <= 1 and 0 <= y <= 1):
        return None
    return min(int(y * h), h - 1), min(int(x * w), w - 1)


def reference(polygons: list[list[Point]], images: list[int], batch: int, size: tuple[int, int]) -> torch.Tensor:
    h, w = size
    mask = torch.zeros(batch, h, w, dtype=torch.bool)
    for corners, image in zip(polygons, images, strict=True):
        for i in range(h):
            for j in range(w):
                if inside(Fraction(2 * j + 1, 2 * w), Fraction(2 * i + 1, 2 * h), corners):
                    mask[image, i, j] = True
        cell = centre_cell(corners, size)
        if cell is not None:
            mask[image, cell[0], cell[1]] = True
    return mask


# Eighths of the finest cell: exact but for one division at a slanted edge, and full of corners that fall on centres,
# edges that are level and boxes without area.
COORDINATE = st.integers(-16, 80).map(lambda value: Fraction(value, 64))
POLYGON = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=4, max_size=4)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    boxes=st.lists(st.tuples(POLYGON, st.integers(0, 2)), max_size=5),
    size=st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
)
def test_any_quadrilaterals_match_the_loop(boxes: list[tuple[list[Point], int]], size: tuple[int, int]) -> None:
    polygons, images = [polygon for polygon, _ in boxes], [image for _, image in boxes]
    corners = torch.tensor([[[float(x), float(y)] for x, y in polygon] for polygon in polygons], dtype=torch.float64)
    made = Boxes.of(corners.view(-1, 4, 2), torch.tensor(images), format="polygon")
    assert torch.equal(made.mask(3, size), reference(polygons, images, 3, size))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    box=st.tuples(st.floats(0, 640), st.floats(0, 384), st.floats(1, 500), st.floats(1, 300), st.floats(-7, 7)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 20)),
    normalized=st.booleans(),
)
def test_oriented_boxes_match_the_loop(box: tuple[float, ...], size: tuple[int, int], normalized: bool) -> None:
    (cx, cy, width, height, angle), (h, w) = box, size
    cos, sin = math.cos(angle), math.sin(angle)
    pixels = [
        (cx + a * width / 2 * cos - b * height / 2 * sin, cy + a * width / 2 * sin + b * height / 2 * cos)
        for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))
    ]
    row = [cx / 640, cy / 384, width / 640, height / 384, angle] if normalized else list(box)
    made = Boxes.of(
        torch.tensor([row]), torch.tensor([[0.0]]), format="xywhr", image_size=(384, 640), normalized=normalized
    )
    mask = made.mask(1, size)[0]
    exact = [(Fraction(x), Fraction(y)) for x, y in pixels]
    x_cell, y_cell = cx / 640 * w, cy / 384 * h
    # float32 cannot say on which side of a line a point lies that is a hundredth of a pixel from it.
    own = [
        (i, j)
        for i in range(h)
        for j in range(w)
        if i - 1e-3 <= y_cell <= i + 1 + 1e-3 and j - 1e-3 <= x_cell <= j + 1 + 1e-3
    ]
    assert any(mask[cell] for cell in own)
    for i in range(h):
        for j in range(w):
            x, y = (j + 0.5) * 640 / w, (i + 0.5) * 384 / h
            if (i, j) not in own and distance_to_edges(x, y, pixels) > 0.01:
                assert bool(mask[i, j]) == inside(Fraction(x), Fraction(y), exact), (i, j)


def test_boxes_side_by_side_share_no_cell_and_leave_none_out() -> None:
    # The common edge runs through the centres of column 2 (of 5).
    left = Boxes.of(torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.tensor([0]), format="xyxy").mask(1, (4, 5))
    right = Boxes.of(torch.tensor([[0.5, 0.0, 1.0, 1.0]]), torch.tensor([0]), format="xyxy").mask(1, (4, 5))
    assert not (left & right).any()
    assert (left | right).all()
    assert right[0, 0].tolist() == [False, False, True, True, True]


def test_every_format_gives_the_same_mask() -> None:
    index, size, image = torch.tensor([1]), (12, 10), (384, 320)
    masks = [
        Boxes.of(torch.tensor([row]), index, format=name, image_size=image, normalized=normalized).mask(2, size)
        for name, normalized, row in [
            ("xyxy", True, [0.2, 0.25, 0.6, 0.5]),
            ("xyxy", False, [64.0, 96.0, 192.0, 192.0]),
            ("xywh", True, [0.4, 0.375, 0.4, 0.25]),
            ("xywh", False, [128, 144, 128, 96]),  # integers too
            ("xywhr", True, [0.4, 0.375, 0.4, 0.25, 0.0]),
            ("xywhr", False, [128.0, 144.0, 96.0, 128.0, math.pi / 2]),
            ("polygon", True, [0.2, 0.25, 0.6, 0.25, 0.6, 0.5, 0.2, 0.5]),
            ("polygon", False, [[64.0, 96.0], [64.0, 192.0], [192.0, 192.0], [192.0, 96.0]]),  # the other way around
        ]
    ]
    expected = torch.zeros(2, 12, 10, dtype=torch.bool)
    expected[1, 3:6, 2:6] = True
    for mask in masks:
        assert torch.equal(mask, expected)


def test_ultralytics_batches_of_both_tasks() -> None:
    index = torch.tensor([0.0, 2.0])  # its loader gives floats
    upright = {"bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.01, 0.01]])}
    batch = {"batch_idx": index, "img": torch.zeros(3, 3, 64, 128, dtype=torch.uint8)} | upright
    mask = Boxes.from_ultralytics(batch).mask(3, (4, 8))
    assert mask.sum((1, 2)).tolist() == [8, 0, 1]  # the small box keeps the cell of its centre; image 1 is empty
    assert mask[2, 1, 2]
    turned = {"bboxes": torch.cat([upright["bboxes"], torch.tensor([[math.pi / 2], [0.3]])], 1)}
    mask = Boxes.from_ultralytics(batch | turned).mask(3, (4, 8))
    # 64 x 32 pixels turned upright: two columns of four rows. Turned in shares of the image, it would be another box.
    assert mask[0].int().sum(0).tolist() == [0, 0, 0, 4, 4, 0, 0, 0]
    with pytest.raises(InputError, match="batch_idx missing"):
        Boxes.from_ultralytics({"bboxes": upright["bboxes"], "img": batch["img"]})


def test_one_tensor_an_image() -> None:
    boxes = Boxes.of([torch.zeros(0), torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]])], format="xywh")
    assert len(boxes) == 2
    assert boxes.mask(2, (2, 2)).int().tolist() == [[[0, 0], [0, 0]], [[1, 0], [0, 1]]]


def test_no_boxes_at_all() -> None:
    for empty in (torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 5)):
        assert not Boxes.of(empty, torch.zeros(0), format="xywhr", image_size=(32, 32)).mask(2, (3, 3)).any()


def test_padding_and_broken_boxes_mark_nothing_and_harm_no_other() -> None:
    rows = [[0.3, 0.3, 0.0, 0.0], [math.nan, 0.5, 0.2, 0.2], [0.5, 0.5, math.inf, 0.2], [0.75, 0.75, 0.5, 0.5]]
    mask = Boxes.of(torch.tensor(rows), torch.zeros(4), format="xywh").mask(1, (4, 4))
    expected = torch.zeros(1, 4, 4, dtype=torch.bool)
    expected[0, 2:, 2:] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ConfigError, "format must be one of", {"format": "cxcywh"}),
        (ConfigError, "image_size must be", {"format": "xywhr"}),
        (ConfigError, "image_size must be", {"format": "xyxy", "normalized": False}),
        (InputError, r"boxes must be \[N, 8\]", {"format": "polygon"}),
        (InputError, "got a corner at 320", {"format": "xyxy"}),
    ],
)
def test_wrong_options_and_shapes(error: type[Exception], match: str, options: dict) -> None:
    with pytest.raises(error, match=match):
        Boxes.of(torch.tensor([[10.0, 20.0, 320.0, 40.0]]), torch.tensor([0]), **options)


def test_wrong_batch_indices() -> None:
    box = torch.tensor([[0.1, 0.1, 0.2, 0.2]])
    with pytest.raises(InputError, match=r"batch_index must lie in 0\.\.1 for 2 images; got 2\.\.2"):
        Boxes.of(box, torch.tensor([2]), format="xyxy").mask(2, (4, 4))
    with pytest.raises(InputError, match="one entry per box"):
        Boxes.of(box, torch.tensor([0, 1]), format="xyxy")
    with pytest.raises(InputError, match="must give the image of each box"):
        Boxes.of(box, format="xyxy")
    with pytest.raises(InputError, match="must be None when boxes is a sequence"):
        Boxes.of([box], torch.tensor([0]), format="xyxy")
    with pytest.raises(InputError, match="one tensor per image"):
        Boxes.of([], format="xyxy")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device_same_bits_and_no_wait() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(300, 5, generator=generator) * torch.tensor([1.0, 1.0, 0.4, 0.4, 6.0])
    index = torch.randint(0, 4, (300,), generator=generator)
    expected = Boxes.of(rows, index, format="xywhr", image_size=(384, 640)).mask(4, (24, 40))
    rows_gpu, index_gpu = rows.cuda(), index.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = Boxes.of(rows_gpu, index_gpu, format="xywhr", image_size=(384, 640)).mask(4, (24, 40))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Sines differ in the last bit between devices; a centre that near an edge may fall either way.
    assert (mask.cpu() != expected).sum() <= 2
