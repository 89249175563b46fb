"""The files of the demonstration: loss curve, maps, summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from dinov3_ray.pictures import PcaBasis, save_grid

__all__ = [
    "LOSS_FILE",
    "MAPS_FILE",
    "SUMMARY_FILE",
    "Summary",
    "save_loss_curve",
    "save_maps",
    "save_summary",
]


LOSS_FILE, MAPS_FILE, SUMMARY_FILE = "loss.png", "maps.png", "summary.json"


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run, as summary.json holds them.

    Attributes:
        teacher: the pool's description of its teacher.
        fingerprint: of the teacher.
        replicas: their number in the pool.
        pictures: the number of pictures that the views were cropped from.
        batch: views per step.
        losses: one per step: 1 - cosine between student and teacher, the mean over all patches of the batch.
        first_loss: the loss of the first step.
        last_loss: the mean loss of the last tenth of the steps.
        images_per_second: views per second of training, with the time until the first targets arrived.
        wait_share: the share of the training's time that was spent waiting for the teacher, 0 to 1.
        training_seconds: the time of the training loop.
        total_seconds: the time from the start of the command until this was written.
        probe_before, probe_after: of a run with ``--trained``, the mIoU of a linear probe on the student's map before
            and after the training, on scenes that it never saw, 0 to 1; else None, and not in summary.json.
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
    probe_before: float | None = None
    probe_after: float | None = None


def save_summary(folder: Path, summary: Summary) -> None:
    """Write summary.json to ``folder``."""
    known = {name: value for name, value in asdict(summary).items() if value is not None or name == "fingerprint"}
    (folder / SUMMARY_FILE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def save_loss_curve(folder: Path, losses: Sequence[float]) -> None:
    """Draw the losses of all steps, and their moving average, to loss.png in ``folder``."""
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
    """The exponential moving average, corrected for its bias towards the first value."""
    total = norm = 0.0
    smoothed = []
    for loss in losses:
        total, norm = weight * total + loss, weight * norm + 1
        smoothed.append(total / norm)
    return smoothed


def save_maps(folder: Path, pictures: Sequence[Tensor], teacher_BDhw: Tensor, student_BDhw: Tensor) -> None:
    """Draw each picture (uint8 [3,H,W]) next to both maps, in the colours of the teacher's principal components."""
    # The loss is a cosine, so the student's features may have any length.
    teacher_BDhw, student_BDhw = (F.normalize(map_BDhw, dim=1) for map_BDhw in (teacher_BDhw, student_BDhw))
    basis = PcaBasis.fit(teacher_BDhw)
    rows = [
        [picture.permute(1, 2, 0).numpy(), basis.rgb(teacher_Dhw), basis.rgb(student_Dhw)]
        for picture, teacher_Dhw, student_Dhw in zip(pictures, teacher_BDhw, student_BDhw, strict=True)
    ]
    save_grid(rows, folder / MAPS_FILE, ["image", "teacher's map", "student's map"])
