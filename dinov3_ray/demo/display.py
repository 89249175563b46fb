"""What the demonstration shows while it runs: moving bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

__all__ = ["Display", "Report"]

Report = Callable[[int, float, float, float], None]
"""Told after each step: its number from 1, the loss, images a second so far, the share of the time spent waiting."""

_LINES = 10  # of progress, where they cannot be overwritten


class Display:
    """Writes to standard error, so that what is left for scripts has standard output to itself."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def phase(self, text: str) -> AbstractContextManager[object]:
        """Shows ``text`` while something is done that has no steps."""
        if self._console.is_terminal:
            return self._console.status(f"{text} ...")
        self.note(text)
        return _nothing()

    @contextmanager
    def training(self, steps: int) -> Iterator[Report]:
        """Shows the training's progress through the :data:`Report` that it gives."""
        if not self._console.is_terminal:
            yield lambda step, *numbers: self._line(step, steps, *numbers)
            return
        bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            expand=True,
        )
        with bar:
            task = bar.add_task("training", total=steps, numbers="")
            yield lambda step, *numbers: bar.update(task, completed=step, numbers=_numbers(*numbers))

    def _line(self, step: int, steps: int, loss: float, rate: float, waiting: float) -> None:
        if step == 1 or step == steps or step * _LINES // steps > (step - 1) * _LINES // steps:
            self.note(f"step {step}/{steps}  {_numbers(loss, rate, waiting)}")


def _numbers(loss: float, rate: float, waiting: float) -> str:
    return f"loss {loss:.3f}  {rate:.1f} img/s  {waiting:.0%} waiting for the teacher"


@contextmanager
def _nothing() -> Iterator[None]:
    yield
