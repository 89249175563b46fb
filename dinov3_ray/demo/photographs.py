"""The user's own photographs, read into memory at a size that suits a demonstration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.errors import ConfigError, InputError

__all__ = ["Photographs", "read_photographs"]

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
