"""What the proof found: the mIoU of each arm and seed, what that proves, and the same as tables and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from dinov3_ray.bench.printout import describe_machine, new_table
from dinov3_ray.bench.proof.arms import ARMS, ProofSettings, TeacherName
from dinov3_ray.bench.proof.paired import Bounds, paired_bounds
from dinov3_ray.pictures import save_grid
from dinov3_ray.scenes.drawing import CLASSES
from dinov3_ray.scenes.scenery import Scenery

__all__ = ["SHOWN", "Proof", "Score"]

SHOWN = 4
"""Unseen scenes in the picture of predictions."""

_NAMES = ("sand", "red", "blue", "grey", "green")
_COLOURS = np.array(((206, 196, 140), (200, 72, 60), (60, 130, 200), (90, 90, 96), (40, 120, 50)), np.uint8)
_KEY = ", ".join(f"{name}: {colour}" for name, colour in zip(CLASSES, _NAMES, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """Of one student or teacher, by the probe: mIoU on all unseen scenes, and the classes of some, int64 [S,y,x]."""

    miou: float
    shown: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """What came out.

    Attributes:
        settings: as given.
        arms: the scores of each of :data:`~dinov3_ray.bench.proof.arms.ARMS`, one per seed.
        teachers: those of the teachers' own maps.
        shown: the unseen scenes that scores show.
    """

    settings: ProofSettings
    arms: Mapping[str, Sequence[Score]]
    teachers: Mapping[TeacherName, Sequence[Score]]
    shown: Scenery

    def gain(self, arm: str, over: str = "labels") -> Bounds:
        """The gain in mIoU of one arm over another, seed by seed."""
        return paired_bounds(_mious(self.arms[arm]), _mious(self.arms[over]))

    @property
    def share_handed_on(self) -> float | None:
        """The gain of the trained arm over labels alone, divided by the gain of its teacher over them, by the means;
        None if the teacher has no gain."""
        teacher, trained, labels = (
            _mean(found) for found in (self.teachers["trained"], self.arms["trained"], self.arms["labels"])
        )
        return (trained - labels) / (teacher - labels) if teacher > labels else None

    def passes(self, arm: str) -> bool:
        """Whether an arm has gained, by the lower bounds, over the labels alone and over a random teacher.

        A random teacher brings a little over the labels, since any function of the image trains a student. This gain is
        not knowledge, so a random teacher does not pass.
        """
        return self.gain(arm).low > 0 and self.gain(arm, "random").low > 0

    def complaints(self) -> list[str]:
        """The reasons why this is not a proof, one sentence each; empty if it is one."""
        beaten = {"labels": "the labels alone", "random": "a random teacher", "swapped": "the maps of other images"}
        found = [
            f"Distilling from the trained teacher was not shown to beat {what}: {_told(gain)} points."
            for over, what in beaten.items()
            if not (gain := self.gain("trained", over)).low > 0
        ]
        gain = self.gain("swapped")
        if gain.low > 0:
            found.append(f"The control passes, and must not: {ARMS['swapped'].title}, {_told(gain)} points.")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": describe_machine(),
            "seeds": self.settings.seeds,
            "gain_over_labels": asdict(self.gain("trained")),
            "gain_over_random_teacher": asdict(self.gain("trained", "random")),
            "share_handed_on": self.share_handed_on,
            "complaints": self.complaints(),
            "arms": {
                name: {
                    "miou": _mious(found),
                    "mean": _mean(found),
                    "gain_over_labels": asdict(self.gain(name)),
                    "passes": self.passes(name),
                }
                for name, found in self.arms.items()
            },
            "teachers": {name: {"miou": _mious(found), "mean": _mean(found)} for name, found in self.teachers.items()},
            "settings": asdict(self.settings),
        }

    def tables(self) -> list[Table]:
        settings, share = self.settings, self.share_handed_on
        told = (
            "The teacher has no advantage" if share is None else f"{share:.0%} of the teacher's advantage was handed on"
        )
        table = new_table(
            f"{settings.labels} labels, with and without a teacher",
            f"mIoU in % on {settings.unseen} unseen scenes, mean of {settings.seeds} seeds; gains in points, paired by "
            f"seed, with 95% bounds. {told}. {describe_machine()}.",
            "",
            "mIoU",
            "over labels alone",
            "over a random teacher",
        )
        for name, found in self.arms.items():
            over_labels = "-" if name == "labels" else _told(self.gain(name))
            over_random = _told(self.gain(name, "random")) if name in ("joint", "trained") else "-"
            table.add_row(ARMS[name].title, f"{100 * _mean(found):.1f}", over_labels, over_random)
        table.add_section()
        for teacher, found in self.teachers.items():
            table.add_row(f"the {teacher} teacher itself", f"{100 * _mean(found):.1f}", "-", "-")
        return [table]

    def save_pictures(self, folder: Path) -> list[Path]:
        """Write gains.png and predictions.png to ``folder``, which must be there."""
        gains, predictions = folder / "gains.png", folder / "predictions.png"
        self._save_gains(gains)
        found = {"labels": self.shown.labels}
        found |= {ARMS[name].title: scores[0].shown for name, scores in self.arms.items()}
        found["trained teacher itself"] = self.teachers["trained"][0].shown
        rows = [
            [
                picture_3HW.permute(1, 2, 0).numpy(),
                *(_COLOURS[classes_Syx[index].numpy()] for classes_Syx in found.values()),
            ]
            for index, picture_3HW in enumerate(self.shown.pictures)
        ]
        save_grid(rows, predictions, ["scene", *found], heading=_KEY)
        return [gains, predictions]

    def _save_gains(self, path: Path) -> None:
        figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        found = {ARMS[name].title: _mious(scores) for name, scores in self.arms.items()}
        found["the trained teacher itself"] = _mious(self.teachers["trained"])
        for place, mious in enumerate(found.values()):
            colour = "#8a8a8a" if place == len(found) - 1 else "#9db8d9"
            left.barh(place, 100 * statistics.fmean(mious), color=colour)
            left.plot([100 * miou for miou in mious], [place] * len(mious), "o", color="#1f4e8c", markersize=4)
        left.set(yticks=range(len(found)), yticklabels=list(found), xlabel="mIoU on unseen scenes, %; a dot per seed")
        gains = {ARMS[name].title: self.gain(name) for name in self.arms if name != "labels"}
        for place, gain in enumerate(gains.values(), start=1):
            right.barh(place, 100 * gain.mean, color="#9db8d9")
            reach = 100 * (gain.high - gain.mean)
            right.errorbar(100 * gain.mean, place, xerr=reach, color="#1f4e8c", capsize=4)
        right.axvline(0, color="black", linewidth=0.8)
        right.set(yticks=range(1, len(gains) + 1), yticklabels=[], xlabel="gain over labels alone, points; 95% bounds")
        right.set_ylim(left.get_ylim())
        for axes in (left, right):
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)


def _mious(scores: Sequence[Score]) -> list[float]:
    return [score.miou for score in scores]


def _mean(scores: Sequence[Score]) -> float:
    return statistics.fmean(_mious(scores))


def _told(gain: Bounds) -> str:
    return f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
