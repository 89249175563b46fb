"""Drawn scenes, views from above, each made from a seed alone; the drawing itself gives the label of every pixel.

Shapes: S scenes, height H and width W.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

__all__ = ["CLASSES", "draw_labelled", "draw_scene"]

CLASSES = ("field", "roof", "water", "road", "tree")
"""What the labels 0, 1, ... mean. A shadow belongs to the ground that it falls on, and a shore to its water."""

Point = tuple[float, float]
Colour = tuple[int, int, int]

_OVERSAMPLING = 2  # smooth edges: drawn larger, then reduced
_FIELDS = ((96, 134, 62), (134, 160, 74), (176, 158, 96), (201, 178, 122), (70, 110, 60), (158, 124, 84))
_ROOFS = ((172, 84, 62), (196, 120, 88), (148, 150, 158), (210, 206, 196))
_WATER, _SHORE, _ROAD, _SHADOW, _TREE = (44, 92, 128), (196, 184, 140), (92, 92, 98), (40, 44, 40), (40, 84, 38)
_FIELD_LABEL, _ROOF_LABEL, _WATER_LABEL, _ROAD_LABEL, _TREE_LABEL = range(len(CLASSES))


class _Canvas:
    """A picture and the labels of its pixels, drawn together."""

    def __init__(self, size: int) -> None:
        self.picture, self.labels = Image.new("RGB", (size, size)), Image.new("L", (size, size), _FIELD_LABEL)
        self._onto_picture, self._onto_labels = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.labels)

    def polygon(self, points: Sequence[Point], colour: Colour, label: int | None) -> None:
        """Fill a polygon; the labels below it stay where ``label`` is None."""
        self._onto_picture.polygon(points, fill=colour)
        if label is not None:
            self._onto_labels.polygon(points, fill=label)

    def ellipse(self, middle: Point, radii: Point, colour: Colour, label: int, rim: Colour | None = None) -> None:
        (x, y), (across, down) = middle, radii
        box = (x - across, y - down, x + across, y + down)
        self._onto_picture.ellipse(box, colour, rim, self.picture.width // 100 if rim else 1)
        self._onto_labels.ellipse(box, label)


def draw_scene(seed: int, side: int = 320) -> Tensor:
    """One view from above, of fields, a lake, houses, a road and trees: uint8 RGB [3,side,side]."""
    return draw_labelled(seed, side)[0]


def draw_labelled(seed: int, side: int = 320) -> tuple[Tensor, Tensor]:
    """A scene, uint8 RGB [3,side,side], and the label of each of its pixels, uint8 [side,side]: see :data:`CLASSES`."""
    chance = random.Random(f"scene {seed}")  # noqa: S311 - the same pictures every time, and no secret
    size = side * _OVERSAMPLING
    canvas = _Canvas(size)

    def spot() -> Point:
        return chance.uniform(0, size), chance.uniform(0, size)

    angle, at = chance.uniform(0, math.pi), -0.8 * size
    while at < 0.8 * size:
        breadth = chance.uniform(0.15, 0.45) * size
        middle = _along((size / 2, size / 2), angle + math.pi / 2, at + breadth / 2)
        canvas.polygon(_rectangle(middle, 2 * size, breadth, angle), chance.choice(_FIELDS), _FIELD_LABEL)
        at += breadth
    for _ in range(chance.randint(6, 12)):
        (x, y), turn = spot(), chance.uniform(0, math.pi)
        length, breadth = size * chance.uniform(0.08, 0.16), size * chance.uniform(0.06, 0.09)
        canvas.polygon(_rectangle((x + size / 70, y + size / 70), length, breadth, turn), _SHADOW, None)
        canvas.polygon(_rectangle((x, y), length, breadth, turn), chance.choice(_ROOFS), _ROOF_LABEL)
    middle, radii = spot(), (size * chance.uniform(0.15, 0.3), size * chance.uniform(0.1, 0.2))
    canvas.ellipse(middle, radii, _WATER, _WATER_LABEL, _SHORE)
    middle, angle = spot(), chance.uniform(0, math.pi)
    canvas.polygon(_rectangle(middle, 3 * size, size / 15, angle), _ROAD, _ROAD_LABEL)
    for _ in range(chance.randint(20, 60)):
        middle, radius = spot(), size * chance.uniform(0.012, 0.03)
        canvas.ellipse(middle, (radius, radius), _TREE, _TREE_LABEL)
    pixels_HW3 = np.asarray(canvas.picture.resize((side, side), Image.Resampling.LANCZOS))
    grain_HW1 = np.random.default_rng(seed).normal(0, 5, (side, side, 1))
    picture_HW3 = np.clip(pixels_HW3 + grain_HW1, 0, 255).astype(np.uint8)
    labels_HW = np.asarray(canvas.labels.resize((side, side), Image.Resampling.NEAREST)).copy()
    return torch.from_numpy(picture_HW3).permute(2, 0, 1).contiguous(), torch.from_numpy(labels_HW)


def _along(start: Point, angle: float, way: float) -> Point:
    return start[0] + way * math.cos(angle), start[1] + way * math.sin(angle)


def _rectangle(centre: Point, length: float, breadth: float, angle: float) -> list[Point]:
    """Its corners; ``length`` lies under ``angle``."""
    ends = [_along(centre, angle, way) for way in (-length / 2, length / 2)]
    sides = ((ends[0], -breadth), (ends[0], breadth), (ends[1], breadth), (ends[1], -breadth))
    return [_along(end, angle + math.pi / 2, way / 2) for end, way in sides]
