"""Handles Ctrl-C, and a scheduler's SIGTERM, at any moment.

Nothing is left half started or half stopped, and every wait ends. This module imports nothing heavy, so that
a command can install it before torch and Ray are loaded.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interrupts", "wait"]


_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP


class Interrupts:
    """A context in which the first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt; within :meth:`held`, at its end.

    Later signals raise nothing, so that they do not interrupt the clean-up after the first. A signal that this process
    was started to ignore, as SIGHUP by nohup, stays ignored. For the main thread only.

    Args:
        last_words: what :meth:`at_once` writes.
        signals: the numbers of those that are meant.

    Attributes:
        signal: the number of the first signal; None before it.
    """

    def __init__(self, last_words: str, signals: Sequence[int] = _SIGNALS) -> None:
        self.last_words = last_words
        self._signals = signals
        self.signal: int | None = None
        self._at_once = False
        self._raised = False
        self._held = 0
        self._before: dict[int, Any] = {}

    @classmethod
    def of_schedulers(cls) -> Self:
        """For SIGTERM and SIGHUP alone: a second Ctrl-C may interrupt a clean-up that the first one has begun."""
        return cls("", [number for number in _SIGNALS if number != signal.SIGINT])

    @property
    def exit_code(self) -> int:
        """The exit code that shells expect of a command ended by this signal; 0 if no signal came."""
        return 128 + self.signal if self.signal is not None else 0

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came: a library may have caught the first exception."""
        if self.signal is not None:
            self._raise()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A context that needs no clean-up: a signal within it writes ``last_words`` and ends the process.

        For imports: an exception within one leaves a module half initialised, and its exit hooks then fail.
        """
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context that must not be interrupted: a signal within it takes effect at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.signal is not None and not self._raised and not self._held:
            self._raise()

    def __enter__(self) -> Self:
        for number in self._signals:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        if self._at_once:
            os.write(2, f"{self.last_words}\n".encode())
            os._exit(self.exit_code)
        if not self._held and not self._raised:
            self._raise()

    def _raise(self) -> None:
        self._raised = True
        raise KeyboardInterrupt


_SLICE_SECONDS = 0.5


def wait(once: Callable[[float], bool], timeout: float | None = None) -> bool:
    """Call ``once(seconds)``, which waits at most that long, until it returns True; False after ``timeout`` seconds.

    It waits in slices, because Python handles signals only between two steps of the main thread. A signal that comes
    just as a wait begins, or that the system delivers to another thread, does not end a wait without a time limit.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > _SLICE_SECONDS:
        if once(_SLICE_SECONDS):
            return True
    return once(max(left, 0.0))
