"""Runs the parts in a worker process, each within its share of the time, and writes down what the worker says."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from dinov3_ray.bench.gpu.budget import BenchPart, TimeShare, share_of
from dinov3_ray.bench.gpu.journal import Journal, PartRecord
from dinov3_ray.errors import ConfigError, DinoV3Error

__all__ = ["MeasuringProcess", "run_parts", "worker_command"]

_START_SECONDS = 90.0  # for imports, from a disk that is cold
_CLOSE_SECONDS = 15.0
_SLICE_SECONDS = 0.5  # a signal is handled between two of them


class _WorkerEndedError(DinoV3Error):
    """The worker ended by itself, or did not end its part in time."""


class MeasuringProcess:
    """A worker process, in a session of its own: Ctrl-C reaches it through :meth:`close` only.

    Args:
        command: that starts it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - this Python, and a module of this package
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="bench-worker-messages", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._messages.put(json.loads(line))
        self._messages.put(None)

    def order(self, part: str, seconds: float) -> None:
        """Have it measure ``part``, and begin nothing new after ``seconds``."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the next message says
            self._process.stdin.write(json.dumps({"part": part, "seconds": seconds}) + "\n")
            self._process.stdin.flush()

    def message(self, until: float) -> dict[str, Any]:
        """The next message, waited for until the time ``until`` (:func:`time.monotonic`).

        Raises:
            DinoV3Error: none came; says whether the worker has ended.
        """
        while (left := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                message = self._messages.get(timeout=min(left, _SLICE_SECONDS))
                if message is None:
                    raise _WorkerEndedError(f"the worker process ended with exit code {self._process.wait()}")
                return message
        raise _WorkerEndedError("it did not end in time, and was stopped")

    def close(self) -> None:
        """End it: by an interrupt, so that it ends its pool and its Ray, or by force if that takes long."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run_parts(
    parts: Sequence[BenchPart],
    journal: Journal,
    command: Sequence[str],
    total: float,
    on_step: Callable[[str], None],
) -> None:
    """Run ``parts``; a part that fails, or does not end in time, costs the others nothing but its time.

    The journal is written after each message that adds to it, also when this is interrupted.

    Args:
        parts: in their order.
        journal: takes what is found.
        command: that starts a worker.
        total: seconds for all of them.
        on_step: called with what is being done.

    Raises:
        ConfigError: the device is not there.
        KeyboardInterrupt: as a signal asks; the part that ran is noted as interrupted.
    """
    begun = time.monotonic()
    worker: MeasuringProcess | None = None
    try:
        for index, part in enumerate(parts):
            record = journal.parts[part.name]
            left = total - (time.monotonic() - begun)
            share = share_of(left, parts[index:])
            record.state, record.allowed = "running", share.begin
            started = time.monotonic()
            try:
                if worker is None:
                    on_step("start of a worker process")
                    worker = MeasuringProcess(command)
                    _greet(worker, journal)
                _run_part(worker, part, share, started, record, journal, on_step)
            except _WorkerEndedError as error:
                record.state, record.remark = "failed", str(error)
            finally:
                record.seconds = time.monotonic() - started
                if record.state == "running":
                    record.state = "interrupted"
                journal.write()
            if record.state == "failed" and worker is not None:
                # Its device may be of no use any longer, and its memory in use.
                worker.close()
                worker = None
    finally:
        if worker is not None:
            worker.close()


def _greet(worker: MeasuringProcess, journal: Journal) -> None:
    """Wait until the worker is there, and note what device it has."""
    hello = worker.message(time.monotonic() + _START_SECONDS)
    if hello["kind"] == "unable":
        raise ConfigError(hello["remark"])
    journal.header |= hello["machine"]


def _run_part(
    worker: MeasuringProcess,
    part: BenchPart,
    share: TimeShare,
    started: float,
    record: PartRecord,
    journal: Journal,
    on_step: Callable[[str], None],
) -> None:
    end = started + share.end
    worker.order(part.name, max(0.0, started + share.begin - time.monotonic()))
    while record.state == "running":
        message = worker.message(end)
        if message["kind"] == "step":
            on_step(f"{part.name}: {message['what']}")
            continue
        record.note(message)
        if message["kind"] == "row":
            journal.write()


def worker_command(setting: str) -> list[str]:
    """What starts a worker with ``setting`` in JSON."""
    return [sys.executable, "-m", "dinov3_ray.bench.gpu.worker_process", setting]
