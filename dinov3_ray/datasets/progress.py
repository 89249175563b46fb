"""What a run shows of itself while it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Meter", "metering"]


class Meter:
    """Counts images and bytes as blocks are finished, and shows them."""

    def __init__(self, bar: Progress | None, total: int | None, done: int) -> None:
        self.images = 0
        self.bytes = 0
        self._started = time.monotonic()
        self._bar = bar
        if bar is not None:
            self._task = bar.add_task("extracting", total=total, completed=done, rates="")

    def add(self, images: int, size: int) -> None:
        """A block of so many images, and so many bytes written."""
        self.images += images
        self.bytes += size
        if self._bar is not None:
            self._bar.update(self._task, advance=images, rates=str(self))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        return f"{self.images / seconds:,.1f} img/s, {self.bytes / 1e6 / seconds:,.1f} MB/s"


@contextmanager
def metering(show: bool | None, total: int | None, done: int) -> Iterator[Meter]:
    """A meter with a progress bar on standard error, if ``show``, or by default if that is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield Meter(None, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield Meter(bar, total, done)
