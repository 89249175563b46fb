"""Waiting for what other processes bring about, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], what: str | Callable[[], str], timeout: float = 90.0) -> None:
    """Look again and again until ``condition`` holds. ``what`` says what that means, or is asked at the end."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            raise AssertionError(f"waited {timeout} s until {what if isinstance(what, str) else what()}")
        time.sleep(0.05)
