"""What this package tells a Ray that it starts, and what Ray's own start must not change; no Ray is started."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest
import ray

from dinov3_ray.errors import PoolError
from dinov3_ray.interrupts import Interrupts
from dinov3_ray.pool.cluster import connect


@pytest.fixture(autouse=True)
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests of this process may be connected
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to CPUs")
def test_it_has_the_cpus_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        told.append(options)
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        for chosen in ({}, {"num_cpus": 3}):
            with pytest.raises(PoolError):
                connect(may_start=True, **chosen)
    finally:
        os.sched_setaffinity(0, before)
    assert [options["num_cpus"] for options in told] == [1, 3]


def test_a_handler_of_sigterm_hears_what_comes_while_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))  # as ray.init() does
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    with Interrupts("") as interrupts, pytest.raises(KeyboardInterrupt):
        connect(may_start=True)
    assert interrupts.exit_code == 143


def test_a_handler_of_sigterm_is_back_when_ray_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    try:
        with pytest.raises(PoolError):
            connect(may_start=True)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
