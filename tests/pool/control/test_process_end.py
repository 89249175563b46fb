"""When a replica's process has ended, and what is said if it does not: real processes, and what /proc says of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from dinov3_ray.pool.cluster import process_start
from dinov3_ray.pool.control import process_end
from dinov3_ray.pool.control.process_end import end_hung, living_threads, stuck_text
from dinov3_ray.pool.replica.actor import ReplicaProcess

# Its first thread ends, and another one goes on: as when a device's thread is stuck in a driver after SIGKILL.
HEADLESS = """
import ctypes, sys, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
print("under way", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-S", "-c", HEADLESS], stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_process_has_ended_with_its_last_thread(child: subprocess.Popen[bytes]) -> None:
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    assert child.stdout is not None
    assert child.stdout.readline() == b"under way\n"
    until(lambda: process_start(child.pid) == "", "its first thread is a zombie")
    until(lambda: living_threads(child.pid, started) == ["S"], "the other one sleeps")
    assert living_threads(child.pid, "1") == [], "another process, which had this number before"
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: living_threads(child.pid, started) == ["T"], "it is stopped")
    child.kill()
    until(lambda: living_threads(child.pid, started) == [], "it has ended, though nobody has asked how")
    child.wait()
    assert living_threads(child.pid, started) == []


@pytest.mark.parametrize(("states", "living"), [("ZDD", ["D", "D"]), ("ZX", []), ("RtS", ["R", "S", "t"])])
def test_threads_of_a_process_that_does_not_end(tmp_path: Path, states: str, living: list[str]) -> None:
    for number, state in enumerate(states):
        thread = tmp_path / "7" / "task" / str(7 + number)
        thread.mkdir(parents=True)
        text = f"{7 + number} (a name) of its own) {state} {' '.join(map(str, range(1, 50)))}"
        (thread / "stat").write_text(text)
        if number == 0:
            (tmp_path / "7" / "stat").write_text(text)
    assert living_threads(7, "19", tmp_path) == living
    assert living_threads(7, "18", tmp_path) == []
    assert living_threads(8, "19", tmp_path) == []


@pytest.mark.parametrize("states", [["D", "D"], []])
def test_the_gpu_of_a_process_that_does_not_end_is_not_given_away(
    states: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []

    async def kill(process: ReplicaProcess) -> str:
        return stuck_text(process, states) if states else ""

    monkeypatch.setattr(process_end, "kill_process", kill)
    monkeypatch.setattr(process_end.ray, "kill", ended.append)
    said = asyncio.run(end_hung("actor", ReplicaProcess("a node", 123, "19", 0)))
    if states:
        assert said.startswith(
            "process 123 on node a node does not end by SIGKILL: 2 of its threads are in state D (D: "
        )
        assert ended == [], "Ray would take its word that the GPU is free"
    else:
        assert (said, ended) == ("", ["actor"])
