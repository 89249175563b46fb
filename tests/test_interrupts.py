"""Ctrl-C and SIGTERM: held, raised once, or the last words; and waits that they can end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dinov3_ray.interrupts import Interrupts, wait

PATIENCE = 120  # seconds; never reached unless something hangs


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_held_interrupt_comes_at_the_end_and_only_the_first_is_raised() -> None:
    done: list[str] = []

    def hold() -> None:
        with interrupts.held():
            with interrupts.held():
                send(signal.SIGTERM)
            done.append("the outer stretch")
        done.append("what comes after it")

    before = signal.getsignal(signal.SIGTERM)
    with Interrupts("") as interrupts:
        with pytest.raises(KeyboardInterrupt):
            hold()
        send(signal.SIGINT)
        done.append("tidying up")
        assert interrupts.exit_code == 128 + signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert done == ["the outer stretch", "tidying up"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_raised_at_once(number: int) -> None:
    with Interrupts("") as interrupts:
        interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            send(number)
    assert interrupts.signal == number


def test_while_there_is_nothing_to_tidy_up_an_interrupt_ends_the_process_with_the_last_words() -> None:
    program = """
import os, signal
from dinov3_ray.interrupts import Interrupts
try:
    with Interrupts("goodbye") as interrupts, interrupts.at_once():
        os.kill(os.getpid(), signal.SIGINT)
finally:
    print("not reached")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "goodbye\n")


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_it_ends_when_what_it_waits_for_comes(timeout: float | None) -> None:
    event = threading.Event()
    threading.Timer(0.7, event.set).start()  # in the second slice
    assert wait(event.wait, timeout)
    assert wait(event.wait, 0.0), "what is there needs no wait"


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a command
    try:
        with Interrupts("") as interrupts:
            send(signal.SIGHUP)
        assert interrupts.signal is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
