"""How long a stretch of a device's work took, told without making anybody wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Stopwatch", "Stretch"]


class Stretch:
    """One measured stretch of work.

    On a CUDA device two events mark it in the stream, and are read when the device has long passed them: the host is
    never made to wait, as it would be by synchronising around the stretch.
    """

    def __init__(self, seconds: float = 0.0, events: tuple[Any, Any] | None = None) -> None:
        self._seconds = seconds
        self._events = events

    @property
    def seconds(self) -> float:
        """What it took; 0 while a CUDA device has not finished it."""
        if self._events is None:
            return self._seconds
        begin, end = self._events
        return float(begin.elapsed_time(end)) / 1e3 if end.query() else 0.0


class Stopwatch:
    """Times stretches of work, and keeps the last one.

    Attributes:
        last: the last stretch; of 0 seconds before the first.
    """

    def __init__(self) -> None:
        self.last = Stretch()

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Time what is done inside, on ``device``."""
        if device.type != "cuda":
            begun = time.perf_counter()
            yield
            self.last = Stretch(time.perf_counter() - begun)
            return
        event: Any = torch.cuda.Event  # its annotations are partial
        begin, end = event(enable_timing=True), event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        yield
        end.record(stream)
        self.last = Stretch(events=(begin, end))

    @property
    def seconds(self) -> float:
        """Of the last stretch."""
        return self.last.seconds

    def __reduce__(self) -> tuple[type[Stopwatch], tuple[()]]:
        return Stopwatch, ()  # a copy starts anew: events belong to their process and device
