"""The end of a replica's process: by SIGKILL, and seen, before Ray gives its GPU to another replica.

Ray asks a process to end itself. One that computes, or holds Python's lock, is gone within 0.04 s (measured with Ray
2.60.0); one that is stopped gets a SIGKILL 5 s later, where older releases send none. Nothing of Ray says whether the
process has gone then, which one that sleeps in a driver has not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dinov3_ray.machine.processes import STARTED, STATE, read_stat
from dinov3_ray.pool.replica.actor import ReplicaProcess

__all__ = ["end_hung", "kill_process", "living_threads", "stuck_text"]

_TASK_SECONDS = 20.0  # until the node must have started the task, and it have ended
_END_SECONDS = 5.0  # after SIGKILL, until a process that is still there is said to be stuck
_LOOK_SECONDS = 0.02


async def end_hung(actor: Any, process: ReplicaProcess) -> str:
    """End a replica that may not answer: first its process, then its actor.

    While the process is there, Ray keeps its GPU for it. So the replacement gets the GPU after it is gone.

    Returns:
        Why the process has not ended; then its actor is left alone, and its GPU with it. "" if it has, or if its node
        has not answered in time, where Ray's own way must do.
    """
    with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
        trouble: str = await asyncio.wait_for(kill_process(process), _TASK_SECONDS)
        if trouble:
            return trouble
    ray.kill(actor)
    return ""


def kill_process(process: ReplicaProcess) -> Any:
    """Kill ``process`` on its node, if it is there; returns a reference to why it has not ended, or "" if it has."""
    here = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    return _kill_and_wait.options(scheduling_strategy=here).remote(process)


@ray.remote(num_cpus=0, max_retries=0)
def _kill_and_wait(process: ReplicaProcess) -> str:
    deadline = time.monotonic() + _END_SECONDS
    while states := living_threads(process.pid, process.started):
        if time.monotonic() > deadline:
            return stuck_text(process, states)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(_LOOK_SECONDS)
    return ""


def stuck_text(process: ReplicaProcess, states: Sequence[str]) -> str:
    """Why ``process``, whose threads are in these states after SIGKILL, has not ended, and what to do."""
    return (
        f"process {process.pid} on node {process.node_id} does not end by SIGKILL: {len(states)} of its threads are in "
        f"state {', '.join(sorted(set(states)))} (D: uninterruptible sleep, as in a driver). It keeps its GPU until it "
        "ends (restart the node if it does not)"
    )


def living_threads(pid: int, started: str, proc: Path = Path("/proc")) -> list[str]:
    """The states of the threads of process ``pid`` that have not ended, if it is the one that began at ``started``.

    A process holds its memory and devices until its last thread has ended: its first one may be a zombie long before,
    while another is stuck in a driver.
    """
    if not started or _stat(proc / str(pid), STARTED) != started:
        return []
    with contextlib.suppress(OSError):
        states = [_stat(thread, STATE) for thread in (proc / str(pid) / "task").iterdir()]
        return sorted(state for state in states if state not in ("", "Z", "X"))
    return []


def _stat(folder: Path, field: int) -> str:
    stat = read_stat(folder)
    return "" if stat is None else stat[1][field]
