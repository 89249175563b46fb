"""Ending a process for certain, and only the one that is meant."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import ray

__all__ = ["kill_process", "process_start"]


def process_start(pid: int) -> str:
    """When process ``pid`` of this machine began, in clock ticks since boot (field 22 of its stat file); "" if unknown.

    A process number may be given to another process later; number and start together name one process for good.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


@ray.remote(num_cpus=0, max_retries=0)
def kill_process(pid: int, started: str) -> bool:
    """Kill process ``pid`` of the node this runs on, if it is still the one that began at ``started``."""
    if not started or process_start(pid) != started:
        return False
    os.kill(pid, signal.SIGKILL)
    return True
