"""The training bench: what it makes of its passes."""

from __future__ import annotations

import pytest
from rich.console import Console

from dinov3_ray.bench.training_steps import KINDS, LoopPass, PoolTimings, TrainingSetting


def test_ratios_are_over_the_pass_that_ran_beside_and_the_fill_is_told_apart() -> None:
    timings = PoolTimings(TrainingSetting(steps=10, step_seconds=0.1))
    for slower in (1.0, 1.2, 1.4):  # a machine that slows down, from repeat to repeat
        timings.passes["teacher-free"].append(LoopPass(10, 0.0, 10 * 0.1 * slower))
        timings.passes["prefetch"].append(LoopPass(10, 0.5 * slower, 10 * 0.101 * slower, wait_share=0.01))
        timings.passes["in-loop teacher"].append(LoopPass(2, 0.0, 2 * 0.2 * slower))
        timings.passes["submit in the step"].append(LoopPass(2, 0.0, 2 * 0.15 * slower))
    assert timings.ratios("prefetch") == pytest.approx([1.01] * 3)
    assert timings.epoch_ratio("prefetch", 10) == pytest.approx(1.01 + 0.5)
    assert timings.epoch_ratio("prefetch", 1000) == pytest.approx(1.01 + 0.005)
    kinds = timings.as_dict()["kinds"]
    assert [round(kinds[kind]["ratio"], 3) for kind in KINDS] == [1.0, 1.01, 2.0, 1.5]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(timings.table())
    (line,) = [line for line in capture.get().splitlines() if "prefetch" in line and "│" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "prefetch",
        "121.2",
        "1.010",
        "1.0%",
        "0.60",
        "1.510",
    ]
