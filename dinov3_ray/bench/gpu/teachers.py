"""One teacher after the other, in each of its modes, compared with transformers and with the device's own bound."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from dinov3_ray.bench.gpu.acceptance import MODES
from dinov3_ray.bench.gpu.setting import Reporter, Workbench
from dinov3_ray.bench.teacher_modes import TeacherWork, modes_for
from dinov3_ray.bench.teacher_speed import Effort, TeacherBench, measure_teacher
from dinov3_ray.config import DinoV3Config
from dinov3_ray.errors import DinoV3Error

__all__ = ["measure_large_teacher", "measure_other_teachers"]


def measure_large_teacher(bench: Workbench, reporter: Reporter) -> None:
    """Measure the large variant at each size."""
    _measure(bench, reporter, ((bench.sizes.large, pixels) for pixels in bench.sizes.pixels))


def measure_other_teachers(bench: Workbench, reporter: Reporter) -> None:
    """Measure the other variants, all of them at the first size before any at the next one."""
    sizes = bench.sizes
    _measure(bench, reporter, ((variant, pixels) for pixels in sizes.pixels for variant in sizes.others))


def _measure(bench: Workbench, reporter: Reporter, cells: Iterator[tuple[str, int]]) -> None:
    sizes = bench.sizes
    modes = [mode for mode in modes_for(bench.device, quick=bench.setting.quick) if mode.name in MODES]
    broken = []
    for variant, pixels in cells:
        cell = f"{variant} at {pixels} px"
        if reporter.leaves_out(cell):
            continue
        reporter.step(f"{cell}, its weights")
        config = DinoV3Config(bench.checkpoint(variant), image_size=pixels, compile=False)
        found = measure_teacher(
            TeacherWork(config, bench.device, sizes.batch_at(pixels)),
            modes,
            Effort(sizes.repeats, sizes.least, to_host=False),
            model=variant,
            on_step=functools.partial(_say, reporter, cell),
            leaves_out=functools.partial(_leaves_out, reporter, cell),
        )
        reporter.row(_row(found, pixels), found.as_dict())
        broken += [f"{cell}, {MODES[row.name]}: {row.missing}" for row in found.rows if row.missing]
    if broken:
        raise DinoV3Error("; ".join(broken))


def _say(reporter: Reporter, cell: str, step: str) -> None:
    reporter.step(f"{cell}, {step}")


def _leaves_out(reporter: Reporter, cell: str, mode: str) -> bool:
    return reporter.leaves_out(f"{cell}, {MODES[mode]}")


def _row(found: TeacherBench, pixels: int) -> dict[str, Any]:
    """Images/s of each mode and of the bound, and the best share of it in bfloat16."""
    shares = [
        row.rate(found.batch) / found.bound(row)
        for row in found.rows
        if row.ours and row.seconds and row.dtype == "bfloat16"
    ]
    rates = {MODES[row.name]: row.rate(found.batch) if row.seconds else None for row in found.rows}
    bound = found.matmul["bfloat16"] / found.flops if "bfloat16" in found.matmul else None
    share = max(shares, default=None)
    return {"model": found.model, "px": pixels, "batch": found.batch, **rates, "bound": bound, "of the bound": share}
