"""What a run shows while it goes on: its progress, and GPUs that the cluster has lost since it began."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from dinov3_ray.datasets.extraction.resources import Allocation

__all__ = ["Meter", "lost", "metering", "watching"]

logger = logging.getLogger("dinov3_ray")

_WATCH_SECONDS = 10.0


class Meter:
    """Counts images and bytes as blocks are finished, and shows them.

    Its clock starts when the first block begins: rates, and the time left, are not those of starting the teacher.
    """

    def __init__(self, bar: Progress | None, total: int | None, done: int) -> None:
        self.images = 0
        self.bytes = 0
        self._started = time.monotonic()
        self._last = 0.0
        self._bar = bar
        if bar is not None:
            self._task = bar.add_task("starting the teacher", total=total, completed=done, rates="", meter=self)

    def add(self, images: int, size: int, seconds: float) -> None:
        """A block of so many images, and so many bytes written, which took ``seconds``."""
        if not self.images:
            self._started = max(self._started, time.monotonic() - seconds)
        self.images += images
        self.bytes += size
        self._last = self.seconds
        if self._bar is not None:
            self._bar.update(self._task, description="extracting", advance=images, rates=str(self))

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
        _TimeLeft(),
    )
    with _without_notes_of_ray_data(), Progress(*columns, console=Console(stderr=True)) as bar:
        yield Meter(bar, total, done)


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


def lost(allocation: Allocation, resources: Mapping[str, float]) -> str | None:
    """What is missing in a cluster of ``resources``, and what to do; None if nothing is."""
    wanted, found = allocation.replicas * allocation.num_gpus, resources.get("GPU", 0.0)
    if found >= wanted:
        return None
    return (
        f"the cluster has {found:g} of the {wanted:g} GPUs that the teachers began with: blocks that were on the rest "
        "wait for a node in their place. To go on without it, interrupt this run, and run the same command again"
    )


@contextmanager
def watching(allocation: Allocation) -> Iterator[None]:
    """Look at the cluster's GPUs now and then, and log a warning when some have gone for longer than a moment."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(allocation, ended), name="dinov3-ray-watch", daemon=True)
    if allocation.num_gpus:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if allocation.num_gpus:
            thread.join()


def _watch(allocation: Allocation, ended: threading.Event) -> None:
    before, warned = None, False
    while not ended.wait(_WATCH_SECONDS):
        try:
            now = lost(allocation, ray.cluster_resources())
        except ray.exceptions.RayError as error:
            logger.debug("the cluster's resources are not known: %s", error)
            continue
        if now and before and not warned:
            logger.warning("%s", now)
        if warned and not now:
            logger.warning("the cluster has all GPUs again that the teachers began with")
        before, warned = now, bool(now and (before or warned))
