"""CPU time of this process and all that it has started, Ray's processes among them."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

__all__ = ["cpu_seconds"]

_PROC = Path("/proc")


def cpu_seconds() -> float | None:
    """Core seconds of this process and its descendants that are alive, since they began.

    Where no Ray is among them (it was joined, not started), those of the whole machine since it started; None where the
    system does not tell.
    """
    if not (_PROC / "stat").exists():
        return None
    ticks, children, has_ray = {}, defaultdict(list), set()
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # pid (name) state parent ...: the name may hold anything
            before, _, after = (folder / "stat").read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        fields, pid = after.split(), int(folder.name)
        ticks[pid] = int(fields[11]) + int(fields[12])
        children[int(fields[1])].append(pid)
        if before.endswith("(raylet"):
            has_ray.add(pid)
    family, found = [os.getpid()], 0
    while found < len(family):
        family += children[family[found]]
        found += 1
    per_second = os.sysconf("SC_CLK_TCK")
    if has_ray.intersection(family):
        return sum(ticks[pid] for pid in family) / per_second
    # user, nice, system, idle, iowait, irq, softirq
    machine = [int(value) for value in (_PROC / "stat").read_text().splitlines()[0].split()[1:8]]
    return (sum(machine) - machine[3] - machine[4]) / per_second
