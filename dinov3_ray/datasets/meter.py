"""What a long run over a data set shows while it goes on: images, bytes, rates and the time that is left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["Meter", "metering"]


class Meter:
    """Counts images and bytes as blocks are finished, and shows them.

    Its clock starts when the first block begins: rates, and the time left, are not those of starting a teacher.
    """

    def __init__(self, bar: Progress | None, total: int | None, done: int, start: str, doing: str) -> None:
        self.images = 0
        self.bytes = 0
        self._started = time.monotonic()
        self._last = 0.0
        self._bar = bar
        self._doing = doing
        if bar is not None:
            self._task = bar.add_task(start, total=total, completed=done, rates="", meter=self)

    def add(self, images: int, size: int, seconds: float) -> None:
        """A block of so many images, and so many bytes written, which took ``seconds``."""
        if not self.images:
            self._started = max(self._started, time.monotonic() - seconds)
        self.images += images
        self.bytes += size
        self._last = self.seconds
        if self._bar is not None:
            self._bar.update(self._task, description=self._doing, advance=images, rates=str(self))

    def seconds_left(self, remaining: float) -> float | None:
        """Seconds for so many images; None before the first block, which shows how fast they go."""
        if not self.images:
            return None
        return max(0.0, remaining * self._last / self.images - (self.seconds - self._last))

    @property
    def seconds(self) -> float:
        """Since the first block began."""
        return time.monotonic() - self._started

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        return f"{self.images / seconds:,.1f} img/s, {self.bytes / 1e6 / seconds:,.1f} MB/s"


class _TimeLeft(ProgressColumn):
    """From all blocks so far: they may be minutes apart, which rich's own column takes for standing still."""

    def render(self, task: Task) -> Text:
        meter: Meter = task.fields["meter"]
        left = None if task.remaining is None else meter.seconds_left(task.remaining)
        if left is None:
            return Text("-:--:-- left")
        minutes, seconds = divmod(round(left), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")


@contextmanager
def metering(show: bool | None, total: int | None, done: int, *, start: str, doing: str) -> Iterator[Meter]:
    """A meter with a progress bar on standard error, if ``show``, or by default if that is a terminal.

    The bar says ``start`` before the first block is finished, and ``doing`` from then on.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield Meter(None, total, done, start, doing)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
        _TimeLeft(),
    )
    with _without_notes_of_ray_data(), Progress(*columns, console=Console(stderr=True)) as bar:
        yield Meter(bar, total, done, start, doing)


@contextmanager
def _without_notes_of_ray_data() -> Iterator[None]:
    """Hide Ray Data's notes, which would break the progress bar. Its warnings still show, and its log file has all."""
    consoles = [one for one in logging.getLogger("ray.data").handlers if isinstance(one, logging.StreamHandler)]
    levels = [console.level for console in consoles]
    for console in consoles:
        console.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for console, level in zip(consoles, levels, strict=True):
            console.setLevel(level)
