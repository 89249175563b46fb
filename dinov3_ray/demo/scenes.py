"""Pictures for a machine without any: drawn views from above, of fields, water, roads, houses, trees and cars.

Each depends on its seed alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

__all__ = ["draw_scene"]

Point = tuple[float, float]
Colour = tuple[int, int, int]

_OVERSAMPLING = 2  # smooth edges: drawn larger, then reduced
_GROUND: Sequence[Colour] = (
    (96, 134, 62),
    (134, 160, 74),
    (176, 158, 96),
    (201, 178, 122),
    (70, 110, 60),
    (158, 124, 84),
)
_WATER: Colour = (44, 92, 128)
_ROAD: Colour = (92, 92, 98)
_ROOFS: Sequence[Colour] = ((172, 84, 62), (196, 120, 88), (148, 150, 158), (210, 206, 196), (112, 88, 84))
_TREES: Sequence[Colour] = ((34, 74, 36), (46, 92, 42), (60, 100, 48))
_CARS: Sequence[Colour] = ((214, 48, 42), (240, 240, 244), (32, 36, 44), (54, 104, 190), (232, 188, 56))


def draw_scene(seed: int, side: int = 320) -> Tensor:
    """One scene: uint8 RGB [3,side,side]."""
    # Not for secrets: the same pictures every time.
    chance = random.Random(f"scene {seed}")  # noqa: S311
    size = side * _OVERSAMPLING
    image = Image.new("RGB", (size, size), _varied(chance, chance.choice(_GROUND)))
    draw = ImageDraw.Draw(image)
    _draw_fields(draw, chance, size)
    lake = _draw_lake(draw, chance, size) if chance.random() < 0.5 else None
    roads = [_road(chance, size) for _ in range(chance.randint(1, 2))]
    width = size / chance.uniform(12, 18)
    for start, end in roads:
        draw.line([start, end], fill=_ROAD, width=round(width))
        draw.line([start, end], fill=(206, 202, 170), width=max(1, round(width / 16)))
    for _ in range(chance.randint(6, 14)):
        spot = (chance.uniform(0, size), chance.uniform(0, size))
        dry = lake is None or math.dist(spot, lake[0]) > lake[1] + size / 12
        if dry and all(_distance(spot, road) > 1.6 * width for road in roads):
            _draw_house(draw, chance, spot, size)
    for _ in range(chance.randint(2, 5)):
        _draw_grove(draw, chance, size)
    for road in roads:
        _draw_cars(draw, chance, road, width)
    image = image.filter(ImageFilter.GaussianBlur(0.6)).resize((side, side), Image.Resampling.LANCZOS)
    return _with_grain(np.asarray(image), seed)


def _with_grain(pixels_HW3: np.ndarray, seed: int) -> Tensor:
    grain = np.random.default_rng(seed).normal(0, 5, pixels_HW3.shape[:2])[..., None]
    grained = np.clip(pixels_HW3 + grain, 0, 255).astype(np.uint8)
    return torch.from_numpy(grained).permute(2, 0, 1).contiguous()


def _draw_fields(draw: ImageDraw.ImageDraw, chance: random.Random, size: int) -> None:
    """Strips that lie side by side under one angle, each with furrows."""
    angle = chance.uniform(0, math.pi)
    at = -0.8 * size
    while at < 0.8 * size:
        breadth = chance.uniform(0.15, 0.45) * size
        colour = _varied(chance, chance.choice(_GROUND))
        middle = _along((size / 2, size / 2), angle + math.pi / 2, at + breadth / 2)
        draw.polygon(_rectangle(middle, 1.6 * size, breadth, angle), fill=colour)
        furrow = tuple(max(0, value - 14) for value in colour)
        for step in range(int(breadth // 14)):
            line = _along((size / 2, size / 2), angle + math.pi / 2, at + 14 * step)
            draw.line([_along(line, angle, -size), _along(line, angle, size)], fill=furrow, width=3)
        at += breadth


def _draw_lake(draw: ImageDraw.ImageDraw, chance: random.Random, size: int) -> tuple[Point, float]:
    """Draws one, and returns its middle and how far it reaches from there."""
    centre = (chance.uniform(0, size), chance.uniform(0, size))
    radius = chance.uniform(0.15, 0.4) * size
    phase = chance.uniform(0, math.tau)
    shore = [
        _along(centre, turn, radius * (1 + 0.25 * math.sin(3 * turn + phase)))
        for turn in (math.tau * step / 60 for step in range(60))
    ]
    draw.polygon(shore, fill=_varied(chance, _WATER), outline=(196, 184, 140), width=round(size / 100))
    return centre, 1.25 * radius


def _road(chance: random.Random, size: int) -> tuple[Point, Point]:
    middle = (chance.uniform(0.25, 0.75) * size, chance.uniform(0.25, 0.75) * size)
    angle = chance.uniform(0, math.pi)
    return _along(middle, angle, -1.5 * size), _along(middle, angle, 1.5 * size)


def _draw_house(draw: ImageDraw.ImageDraw, chance: random.Random, spot: Point, size: int) -> None:
    length, breadth = size * chance.uniform(0.07, 0.16), size * chance.uniform(0.05, 0.09)
    angle = chance.uniform(0, math.pi)
    roof = _varied(chance, chance.choice(_ROOFS))
    shadow = (spot[0] + size / 70, spot[1] + size / 70)
    draw.polygon(_rectangle(shadow, length, breadth, angle), fill=(40, 44, 40))
    draw.polygon(_rectangle(spot, length, breadth, angle), fill=roof)
    shaded = _along(spot, angle + math.pi / 2, breadth / 4)
    draw.polygon(_rectangle(shaded, length, breadth / 2, angle), fill=_darker(roof, 0.75))


def _draw_grove(draw: ImageDraw.ImageDraw, chance: random.Random, size: int) -> None:
    x, y = chance.uniform(0, size), chance.uniform(0, size)
    for _ in range(chance.randint(5, 25)):
        radius = size * chance.uniform(0.012, 0.03)
        spot = (chance.gauss(x, size / 12), chance.gauss(y, size / 12))
        colour = chance.choice(_TREES)
        _draw_disc(draw, spot, radius, colour)
        _draw_disc(draw, (spot[0] - radius / 3, spot[1] - radius / 3), radius / 2, _darker(colour, 1.3))


def _draw_disc(draw: ImageDraw.ImageDraw, spot: Point, radius: float, colour: Colour) -> None:
    draw.ellipse((spot[0] - radius, spot[1] - radius, spot[0] + radius, spot[1] + radius), fill=colour)


def _draw_cars(draw: ImageDraw.ImageDraw, chance: random.Random, road: tuple[Point, Point], width: float) -> None:
    (x0, y0), (x1, y1) = road
    angle, length = math.atan2(y1 - y0, x1 - x0), math.dist(*road)
    at = 0.0
    while (at := at + chance.uniform(1.5, 6) * width) < length:
        lane = _along(_along(road[0], angle, at), angle + math.pi / 2, chance.choice((-1, 1)) * width / 4)
        draw.polygon(_rectangle(lane, 0.8 * width, 0.36 * width, angle), fill=chance.choice(_CARS))


def _along(start: Point, angle: float, way: float) -> Point:
    return start[0] + way * math.cos(angle), start[1] + way * math.sin(angle)


def _rectangle(centre: Point, length: float, breadth: float, angle: float) -> list[Point]:
    ends = (_along(centre, angle, -length / 2), _along(centre, angle, length / 2))
    left, right = angle + math.pi / 2, angle - math.pi / 2
    return [
        _along(end, side, breadth / 2)
        for end, side in ((ends[0], left), (ends[1], left), (ends[1], right), (ends[0], right))
    ]


def _distance(spot: Point, road: tuple[Point, Point]) -> float:
    """Of a point from a straight line."""
    (x0, y0), (x1, y1) = road
    return abs((x1 - x0) * (y0 - spot[1]) - (x0 - spot[0]) * (y1 - y0)) / math.dist(*road)


def _varied(chance: random.Random, colour: Colour) -> Colour:
    return _darker(colour, chance.uniform(0.85, 1.15))


def _darker(colour: Colour, factor: float) -> Colour:
    """``colour`` times ``factor``; brighter above 1."""
    red, green, blue = (min(255, round(value * factor)) for value in colour)
    return red, green, blue
