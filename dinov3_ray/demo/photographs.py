"""The pictures of the demonstration: the user's own photographs, or drawn scenes, each made from a seed alone."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.datasets.formats import IMAGE_EXTENSIONS, has_image_name
from dinov3_ray.errors import ConfigError, InputError

__all__ = ["Photographs", "draw_scene", "read_photographs"]


Point = tuple[float, float]

_OVERSAMPLING = 2  # smooth edges: drawn larger, then reduced
_FIELDS = ((96, 134, 62), (134, 160, 74), (176, 158, 96), (201, 178, 122), (70, 110, 60), (158, 124, 84))
_ROOFS = ((172, 84, 62), (196, 120, 88), (148, 150, 158), (210, 206, 196))
_WATER, _SHORE, _ROAD, _SHADOW, _TREE = (44, 92, 128), (196, 184, 140), (92, 92, 98), (40, 44, 40), (40, 84, 38)


def draw_scene(seed: int, side: int = 320) -> Tensor:
    """One view from above, of fields, a lake, houses, a road and trees: uint8 RGB [3,side,side]."""
    chance = random.Random(f"scene {seed}")  # noqa: S311 - the same pictures every time, and no secret
    size = side * _OVERSAMPLING
    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)

    def spot() -> Point:
        return chance.uniform(0, size), chance.uniform(0, size)

    angle, at = chance.uniform(0, math.pi), -0.8 * size
    while at < 0.8 * size:
        breadth = chance.uniform(0.15, 0.45) * size
        middle = _along((size / 2, size / 2), angle + math.pi / 2, at + breadth / 2)
        draw.polygon(_rectangle(middle, 2 * size, breadth, angle), fill=chance.choice(_FIELDS))
        at += breadth
    for _ in range(chance.randint(6, 12)):
        (x, y), turn = spot(), chance.uniform(0, math.pi)
        length, breadth = size * chance.uniform(0.08, 0.16), size * chance.uniform(0.06, 0.09)
        draw.polygon(_rectangle((x + size / 70, y + size / 70), length, breadth, turn), fill=_SHADOW)
        draw.polygon(_rectangle((x, y), length, breadth, turn), fill=chance.choice(_ROOFS))
    (x, y), radius, height = spot(), size * chance.uniform(0.15, 0.3), size * chance.uniform(0.1, 0.2)
    draw.ellipse((x - radius, y - height, x + radius, y + height), _WATER, _SHORE, size // 100)
    middle, angle = spot(), chance.uniform(0, math.pi)
    draw.polygon(_rectangle(middle, 3 * size, size / 15, angle), fill=_ROAD)
    for _ in range(chance.randint(20, 60)):
        (x, y), radius = spot(), size * chance.uniform(0.012, 0.03)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), _TREE)
    pixels_HW3 = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))
    grain_HW1 = np.random.default_rng(seed).normal(0, 5, (side, side, 1))
    return torch.from_numpy(np.clip(pixels_HW3 + grain_HW1, 0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()


def _along(start: Point, angle: float, way: float) -> Point:
    return start[0] + way * math.cos(angle), start[1] + way * math.sin(angle)


def _rectangle(centre: Point, length: float, breadth: float, angle: float) -> list[Point]:
    """Its corners; ``length`` lies under ``angle``."""
    ends = [_along(centre, angle, way) for way in (-length / 2, length / 2)]
    sides = ((ends[0], -breadth), (ends[0], breadth), (ends[1], breadth), (ends[1], -breadth))
    return [_along(end, angle + math.pi / 2, way / 2) for end, way in sides]


@dataclass(frozen=True, slots=True, eq=False)
class Photographs:
    """The pictures of a folder, uint8 RGB [3,H_i,W_i], and one line for each file that could not be read."""

    pictures: tuple[Tensor, ...]
    skipped: tuple[str, ...]


def read_photographs(folder: Path, *, at_most: int, shorter_side: int) -> Photographs:
    """Read the first pictures in ``folder`` and its subfolders, in the order of their paths.

    Args:
        folder: of image files.
        at_most: the number of files to read.
        shorter_side: larger pictures are reduced until their shorter side has this many pixels.

    Raises:
        ConfigError: the folder is missing, or has no image file.
        InputError: none of the files can be read. The message gives the reason for the first one.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "missing"
        raise ConfigError(f"--images must be a folder of photographs; {folder} is {what}")
    paths = list(islice(_image_paths(folder), at_most))
    if not paths:
        raise ConfigError(f"--images must hold image files ({', '.join(sorted(IMAGE_EXTENSIONS))}); {folder} has none")
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


def _image_paths(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in sorted(names) if has_image_name(name))


def _reduced(picture_3HW: Tensor, shorter_side: int) -> Tensor:
    height, width = picture_3HW.shape[-2:]
    scale = shorter_side / min(height, width)
    if scale >= 1:
        return picture_3HW
    size = (round(height * scale), round(width * scale))
    return F.interpolate(picture_3HW[None], size=size, mode="bilinear", antialias=True)[0]
