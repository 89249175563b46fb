"""The CPU time of decoding large JPEG files, compared with what a loop of one's own does with Pillow."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from dinov3_ray.bench.printout import new_table
from dinov3_ray.datasets.decode import Decoder

__all__ = ["LARGE", "DecodeRate", "decoding_table", "measure_decoding"]


LARGE = (2000, 1500)
"""Width and height of the files, in pixels."""

_SHRINK_TO = 224  # a teacher's usual input: these files are decoded at a quarter of their size
_PASSES = 5


@dataclass(frozen=True, slots=True)
class DecodeRate:
    """One way of decoding.

    Attributes:
        name: as the table shows it.
        seconds: of CPU time (user and system) per image, one value per run.
    """

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Images/s of a core, the median of the runs."""
        return 1 / statistics.median(self.seconds)


def measure_decoding(paths: Sequence[Path], repeats: int) -> list[DecodeRate]:
    """Decode the files on this thread, ways in turn; Pillow's own comes first. The files are read beforehand."""
    files = [path.read_bytes() for path in paths]
    ways: list[tuple[DecodeRate, Callable[[bytes], Any]]] = [
        (DecodeRate("Pillow: open, convert, array [3,H,W]"), _with_pillow),
        (DecodeRate("extract"), Decoder().decode),
        (DecodeRate(f"extract with shrink_to={_SHRINK_TO}"), Decoder(shrink_to=_SHRINK_TO).decode),
    ]
    for turn in range(repeats + 1):
        for rate, decode in ways:
            begun = time.thread_time()
            for _ in range(_PASSES):
                for data in files:
                    decode(data)
            if turn:  # the first run warms up
                rate.seconds.append((time.thread_time() - begun) / _PASSES / len(files))
    return [rate for rate, _ in ways]


def _with_pillow(data: bytes) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1))


def decoding_table(rates: Sequence[DecodeRate]) -> Table:
    """Images/s of a core, by CPU time."""
    title = f"Decoding JPEG files of {LARGE[0]} x {LARGE[1]} px"
    table = new_table(title, f"CPU time, medians of {len(rates[0].seconds)} runs", "", "img/s per core", "times Pillow")
    for rate in rates:
        table.add_row(rate.name, f"{rate.per_second:.1f}", f"{rate.per_second / rates[0].per_second:.2f}")
    return table
