"""Progress of a training on standard error, so that standard output holds nothing but the results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Display", "StepReport"]

StepReport = Callable[[int, Callable[[], float], float, float], None]
"""Called after each step: its number (from 1), the mean loss, the images per second so far, and the share of waiting.

The loss is called where it is shown: it waits for the device.
"""

_LINES = 10  # of progress, where a line cannot be overwritten
_RENEWED = 0.5  # seconds, where it can


class Display:
    """Shows what a command does: on a terminal, in one line that changes; elsewhere, in lines now and then."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def phase(self, text: str) -> AbstractContextManager[object]:
        """Show ``text`` while the block runs."""
        if self._console.is_terminal:
            return self._console.status(f"{text} ...")
        self.note(text)
        return _nothing()

    @contextmanager
    def training(self, steps: int, done: int = 0) -> Iterator[StepReport]:
        """Show the progress of ``steps`` steps, ``done`` of them before; yields what to call after each."""
        if not self._console.is_terminal:
            yield lambda step, *numbers: self._line(step, steps, done, *numbers)
            return
        bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        with bar:
            task = bar.add_task("training", total=steps, completed=done, numbers="")
            shown = -math.inf

            def renew(step: int, loss: Callable[[], float], rate: float, waiting: float) -> None:
                nonlocal shown
                if step == steps or time.monotonic() - shown >= _RENEWED:
                    bar.update(task, numbers=_numbers(loss(), rate, waiting))
                    shown = time.monotonic()
                bar.update(task, completed=step)

            yield renew

    def _line(self, step: int, steps: int, done: int, loss: Callable[[], float], rate: float, waiting: float) -> None:
        if step == done + 1 or step == steps or step * _LINES // steps > (step - 1) * _LINES // steps:
            self.note(f"step {step}/{steps}  {_numbers(loss(), rate, waiting)}")


def _numbers(loss: float, rate: float, waiting: float) -> str:
    return f"loss {loss:.3f}  {rate:.1f} img/s  {waiting:.0%} waiting for the teacher"


@contextmanager
def _nothing() -> Iterator[None]:
    yield
