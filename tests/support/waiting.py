"""Waiting for what other processes bring about, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], bool], what: str, timeout: float = 90.0) -> None:
    """Look again and again until ``condition`` holds. ``what`` says what that means."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s until {what}"
        time.sleep(0.05)
