"""The figures that the GPU path must reach, and whether a run reached them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BASE", "MODES", "Judgement", "judge"]

Row = Mapping[str, Any]

#: The columns of the ways in which one teacher is measured, by the names of bench.teacher_modes.
MODES = {
    "transformers bfloat16": "transformers",
    "transformers bfloat16 without its processor": "its model alone",
    "bfloat16": "eager",
    "bfloat16 compiled": "compiled",
    "float8 compiled": "float8",
}

BASE = "of the bare loop"
"""The column of a rate over that of the bare loop."""

_BFLOAT16 = ("eager", "compiled")
_HOPPER = ("H100", "H200")  # the device of which the rate was asked


@dataclass(frozen=True, slots=True)
class Judgement:
    """One figure.

    Attributes:
        figure: what was asked for.
        least: the least value that passes.
        value: the measured one; None if it was not measured.
        passed: None if it was not measured, or if the run does not count.
        why: the reason why it does not count; empty if it does.
    """

    figure: str
    least: float
    value: float | None
    passed: bool | None
    why: str

    @property
    def word(self) -> str:
        return f"- ({self.why})" if self.passed is None else "pass" if self.passed else "FAIL"


def judge(rows: Mapping[str, Sequence[Row]], device: str, *, counts: bool) -> list[Judgement]:
    """Judge what was measured.

    Args:
        rows: of each part that has any, by the part's name.
        device: its name.
        counts: whether the run was one of full size on a GPU.
    """
    large = next((row for row in rows.get("large-teacher", ()) if row["model"] == "vitl16" and row["px"] == 512), {})
    rate = max((large[name] for name in _BFLOAT16 if large.get(name)), default=None)
    large_one = "ViT-L/16, 512 px, bfloat16"
    why = "" if counts else "not a full run on a GPU"
    hopper = why or ("" if any(name in device for name in _HOPPER) else "asked of an H100")
    return [
        _verdict(f"{large_one}, img/s", 600.0, rate, hopper),
        _verdict(f"{large_one}, of the bound", 0.55, rate and rate / large["bound"], why),
        _verdict("pool of one replica, of the bare loop", 0.95, _ratio(rows.get("pool", ()), "pool"), why),
        _verdict("extraction, of the bare loop", 0.90, _ratio(rows.get("extraction", ()), "extract"), why),
    ]


def _ratio(rows: Sequence[Row], what: str) -> float | None:
    return next((row[BASE] for row in rows if row["what"] == what), None)


def _verdict(figure: str, least: float, value: float | None, why: str) -> Judgement:
    if value is None:
        return Judgement(figure, least, None, None, "not measured")
    return Judgement(figure, least, value, None if why else value >= least, why)
