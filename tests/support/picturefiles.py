"""Folders of generated image files, with broken ones among them, for tests of extraction."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

FORMS = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))
EVERY = 50  # of the files, one is broken, in one way after the other
DAMAGE = ("empty", "cut", "text", "bomb", "header only")


def image_bytes(index: int, form: str) -> bytes:
    """A picture of its own size, 32 to 96 px a side."""
    generator = np.random.default_rng(index)
    height, width = generator.integers(32, 97, 2)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((int(width), int(height)), Image.Resampling.BILINEAR).save(file, form)
    return file.getvalue()


def bomb_bytes(width: int = 20_000, height: int = 10_000) -> bytes:
    """A small PNG file of a great many pixels."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def file_name(index: int) -> str:
    """In one of seven folders."""
    return f"{index % 7}/{index:04}.{FORMS[index % len(FORMS)][0]}"


def damage_of(index: int) -> str | None:
    """How the file of this number is broken, if it is."""
    return DAMAGE[index // EVERY % len(DAMAGE)] if index % EVERY == 0 else None


def write_pictures(root: Path, count: int) -> None:
    """Files 0 to ``count``: JPEG, PNG and WebP by turns."""
    bomb = bomb_bytes()
    for index in range(count):
        path = root / file_name(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = image_bytes(index, FORMS[index % len(FORMS)][1])
        damaged = {
            "empty": b"",
            "cut": data[: len(data) // 2],
            "text": b"a text",
            "bomb": bomb,
            "header only": image_bytes(0, "PNG")[:20],
            None: data,
        }
        path.write_bytes(damaged[damage_of(index)])
