"""Resident memory of processes, and whether it grows with the work that they do."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Sequence
from pathlib import Path

__all__ = ["growth", "resident"]


def resident(process: int | str = "self") -> float:
    """MiB of memory of a process, without what it shares (the object store)."""
    fields = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize() / 2**20


def growth(samples: Sequence[float]) -> float:
    """By how much ``samples``, taken after equal shares of the work, grow from each to the next but one.

    It is the lower quartile: glibc begins an arena of 64 MiB whenever a thread asks at the wrong moment, and few times
    in all; a leak grows at each sample. Work of two kinds may take turns.
    """
    return statistics.quantiles([later - earlier for earlier, later in zip(samples, samples[2:], strict=False)])[0]
