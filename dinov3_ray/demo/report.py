"""What a demonstration shows while it runs, and the files that it leaves: loss curve, pictures and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from dinov3_ray.pictures import PcaBasis, save_grid

__all__ = [
    "LOSS_FILE",
    "MAPS_FILE",
    "SUMMARY_FILE",
    "Display",
    "Report",
    "Summary",
    "save_loss_curve",
    "save_maps",
    "save_summary",
]


LOSS_FILE, MAPS_FILE, SUMMARY_FILE = "loss.png", "maps.png", "summary.json"


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in figures.

    Attributes:
        teacher: what the pool says that it serves.
        fingerprint: of it.
        replicas: of the pool.
        pictures: that the views were cut from.
        batch: views a step.
        losses: of each step: 1 - cosine between student and teacher, averaged over the views' patches.
        first_loss: of the first step.
        last_loss: mean over the last tenth of the steps.
        images_per_second: over the training, the filling of the pipeline included.
        wait_share: of the training's time, that was spent waiting for the teacher.
        training_seconds: of the training.
        total_seconds: from the start of the command to the writing of this.
    """

    teacher: str
    fingerprint: str | None
    replicas: int
    pictures: int
    batch: int
    losses: tuple[float, ...]
    first_loss: float
    last_loss: float
    images_per_second: float
    wait_share: float
    training_seconds: float
    total_seconds: float


def save_summary(folder: Path, summary: Summary) -> None:
    (folder / SUMMARY_FILE).write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")


def save_loss_curve(folder: Path, losses: Sequence[float]) -> None:
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="each step")
    axes.plot(steps, _smoothed(losses), color="#1f4e8c", linewidth=2, label="smoothed")
    axes.set(xlabel="step", ylabel="1 - cosine(student, teacher)", title="Distillation loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / LOSS_FILE)


def _smoothed(losses: Sequence[float], weight: float = 0.85) -> list[float]:
    """The exponential mean, without its bias towards the first value."""
    total = norm = 0.0
    smoothed = []
    for loss in losses:
        total, norm = weight * total + loss, weight * norm + 1
        smoothed.append(total / norm)
    return smoothed


def save_maps(folder: Path, pictures: Sequence[Tensor], teacher_BDhw: Tensor, student_BDhw: Tensor) -> None:
    """Pictures uint8 [3,H,W] beside both maps, in the colours of the teacher's principal components."""
    # The loss is a cosine: it leaves the length of the student's features open.
    teacher_BDhw, student_BDhw = (F.normalize(map_BDhw, dim=1) for map_BDhw in (teacher_BDhw, student_BDhw))
    basis = PcaBasis.fit(teacher_BDhw)
    rows = [
        [picture.permute(1, 2, 0).numpy(), basis.rgb(teacher_Dhw), basis.rgb(student_Dhw)]
        for picture, teacher_Dhw, student_Dhw in zip(pictures, teacher_BDhw, student_BDhw, strict=True)
    ]
    save_grid(rows, folder / MAPS_FILE, ["image", "teacher's map", "student's map"])


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
