"""The demonstration's pictures: the user's own photographs, or drawn views from above, each made from a seed alone."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.errors import ConfigError, InputError

__all__ = ["Photographs", "draw_scene", "read_photographs"]


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


_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True, eq=False)
class Photographs:
    """What a folder gave: uint8 RGB pictures [3,H_i,W_i], and a line on each file that gave none."""

    pictures: tuple[Tensor, ...]
    skipped: tuple[str, ...]


def read_photographs(folder: Path, *, at_most: int, shorter_side: int) -> Photographs:
    """The first pictures in ``folder`` and its subfolders, in the order of their paths.

    Args:
        folder: where to look.
        at_most: files that are read.
        shorter_side: pixels to which the shorter side of larger pictures is reduced.

    Raises:
        ConfigError: there is no such folder, or no image file in it.
        InputError: none of the files can be read; says why for the first of them.
    """
    if not folder.is_dir():
        raise ConfigError(f"--images must be a folder of photographs; {folder} is {_what(folder)}")
    paths = list(islice(_image_paths(folder), at_most))
    if not paths:
        raise ConfigError(f"--images must hold image files ({', '.join(sorted(_SUFFIXES))}); {folder} has none")
    decoder = Decoder()
    pictures, skipped = [], []
    for path in paths:
        try:
            decoded = decoder.decode(path.read_bytes())
        except OSError as error:
            decoded = Unreadable("io", str(error))
        if isinstance(decoded, Unreadable):
            skipped.append(f"{path.relative_to(folder)} ({decoded.kind}): {decoded.detail}")
        else:
            pictures.append(_reduced(torch.from_numpy(decoded), shorter_side))
    if not pictures:
        raise InputError(f"--images must hold a file that can be read; of {folder}, {skipped[0]}")
    return Photographs(tuple(pictures), tuple(skipped))


def _what(path: Path) -> str:
    return "a file" if path.exists() else "missing"


def _image_paths(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in sorted(names) if Path(name).suffix.lower() in _SUFFIXES)


def _reduced(picture_3HW: Tensor, shorter_side: int) -> Tensor:
    height, width = picture_3HW.shape[-2:]
    scale = shorter_side / min(height, width)
    if scale >= 1:
        return picture_3HW
    size = (round(height * scale), round(width * scale))
    return F.interpolate(picture_3HW[None], size=size, mode="bilinear", antialias=True)[0]
