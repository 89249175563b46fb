"""How long a stretch of a device's work took, told without making anybody wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Times the last stretch of work measured with it.

    On a CUDA device two events mark the stretch in the stream, and are read when the device has long passed them: the
    host is never made to wait, as it would be by synchronising around the stretch. Elsewhere the clock is read.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: tuple[Any, Any] | None = None

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Time what is done inside, on ``device``."""
        if device.type != "cuda":
            begun = time.perf_counter()
            yield
            self._seconds = time.perf_counter() - begun
            return
        event: Any = torch.cuda.Event  # its annotations are partial
        begin, end = event(enable_timing=True), event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        yield
        end.record(stream)
        self._events = begin, end

    @property
    def seconds(self) -> float:
        """Of the last stretch; 0 before the first, and while a CUDA device has not finished it."""
        if self._events is None:
            return self._seconds
        begin, end = self._events
        return float(begin.elapsed_time(end)) / 1e3 if end.query() else 0.0

    def __reduce__(self) -> tuple[type[Stopwatch], tuple[()]]:
        return Stopwatch, ()  # a copy starts anew: events belong to their process and device
