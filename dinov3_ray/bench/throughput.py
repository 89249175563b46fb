"""Throughput of a pool and its peers on simulated accelerators, as a share of what the accelerators could do."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import ray
import torch
from rich.table import Table

from dinov3_ray.bench.contenders import CONTENDERS, missing_reason, quiet_data
from dinov3_ray.bench.simulated import Work

__all__ = ["Row", "Throughput", "measure"]


@dataclass(frozen=True, slots=True)
class Row:
    """One contender's seconds, run by run; or the reason why there are none."""

    name: str
    seconds: tuple[float, ...] = ()
    missing: str | None = None

    def images_per_second(self, work: Work) -> float:
        """The median over the runs."""
        return work.batches * work.rows / statistics.median(self.seconds)

    def share_of_ideal(self, work: Work) -> float:
        return work.ideal_seconds / statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Throughput:
    """What was measured, and on what."""

    work: Work
    rows: tuple[Row, ...]
    machine: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "work": asdict(self.work),
            "machine": self.machine,
            "contenders": [
                asdict(row)
                | (
                    {}
                    if row.missing
                    else {
                        "images_per_second": row.images_per_second(self.work),
                        "share_of_ideal": row.share_of_ideal(self.work),
                    }
                )
                for row in self.rows
            ],
        }

    def table(self) -> Table:
        work = self.work
        ideal = work.batches * work.rows / work.ideal_seconds
        table = Table(
            title=f"{work.replicas} simulated accelerators, {work.seconds * 1e3:g} ms for {work.rows} images, "
            f"bfloat16 maps [{work.rows}, {work.channels}, {work.side}, {work.side}]",
            caption=f"ideal {ideal:.0f} img/s; median of {len(self.rows[0].seconds)} runs of {work.batches} batches, "
            f"after one to warm up\n{self.machine}",
        )
        table.add_column("")
        for heading in ("img/s", "of the ideal", "slowest .. fastest run"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            if row.missing:
                table.add_row(row.name, "-", "-", row.missing)
                continue
            shares = [work.ideal_seconds / seconds for seconds in row.seconds]
            spread = f"{min(shares):.0%} .. {max(shares):.0%}"
            rate, share = row.images_per_second(work), row.share_of_ideal(work)
            table.add_row(row.name, f"{rate:.0f}", f"{share:.0%}", spread)
        return table


def measure(work: Work, repeats: int, on_contender: Callable[[str], None]) -> Throughput:
    """Let all contenders do ``work``, one after the other, in the Ray that this process is connected to."""
    rows = []
    with quiet_data():
        for name, contender in CONTENDERS.items():
            on_contender(name)
            missing = missing_reason(name)
            rows.append(Row(name, missing=missing) if missing else Row(name, tuple(contender(work, repeats))))
    return Throughput(work, tuple(rows), describe_machine())


def describe_machine() -> str:
    return (
        f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, ray {ray.__version__}, "
        f"torch {torch.__version__}, transformers {version('transformers')}"
    )
