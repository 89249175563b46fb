"""Waiting in slices: as long as was asked for, and no longer than it takes."""

from __future__ import annotations

import threading
import time

import pytest

from dinov3_ray.interrupts import wait


@pytest.mark.parametrize("timeout", [0.0, -1.0, 0.3, 0.5, 1.2])
def test_it_gives_up_after_the_timeout(timeout: float) -> None:
    asked: list[float] = []
    begun = time.monotonic()
    event = threading.Event()

    def once(seconds: float) -> bool:
        asked.append(seconds)
        return event.wait(seconds)

    assert not wait(once, timeout)
    assert time.monotonic() - begun >= timeout
    assert all(0 <= seconds <= 0.5 for seconds in asked)
    assert sum(asked) <= max(timeout, 0) + 1e-6, "it asks for no more than is left"


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_it_ends_when_what_it_waits_for_comes(timeout: float | None) -> None:
    event = threading.Event()
    threading.Timer(0.7, event.set).start()  # in the second slice
    assert wait(event.wait, timeout)
    assert wait(event.wait, 0.0), "what is there needs no wait"
