"""Waiting in a way that Ctrl-C ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

__all__ = ["wait"]

_SLICE_SECONDS = 0.5


def wait(once: Callable[[float], bool], timeout: float | None = None) -> bool:
    """Call ``once(seconds)``, which waits so long at most, until it returns True; False after ``timeout`` seconds.

    In slices: Python acts on a signal only between two steps of the main thread. One that comes just as a wait begins,
    or that the system hands to another thread, does not end that wait, which might be for ever.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > _SLICE_SECONDS:
        if once(_SLICE_SECONDS):
            return True
    return once(max(left, 0.0))
