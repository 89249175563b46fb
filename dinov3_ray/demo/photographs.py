"""The user's own photographs, for the demonstration."""

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
from dinov3_ray.datasets.formats import IMAGE_EXTENSIONS, has_image_name
from dinov3_ray.errors import ConfigError, InputError

__all__ = ["Photographs", "read_photographs"]


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
