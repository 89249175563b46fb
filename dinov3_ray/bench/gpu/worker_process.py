"""The process that measures: it takes the names of parts from standard input, and writes messages to standard output.

Each line is JSON. A worker first says what device it has. If it cannot have the device, it says so, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO, cast

import torch

from dinov3_ray.bench.gpu.checks import run_marked_tests, run_sanitizer
from dinov3_ray.bench.gpu.serving import measure_extraction, measure_pool
from dinov3_ray.bench.gpu.setting import GpuSetting, PartSkippedError, Reporter, Workbench
from dinov3_ray.bench.gpu.teachers import measure_large_teacher, measure_other_teachers
from dinov3_ray.bench.gpu.trial_step import measure_steps
from dinov3_ray.bench.teacher_speed import device_name
from dinov3_ray.errors import ConfigError

__all__ = ["MEASUREMENTS", "serve"]

#: By the names of the parts.
MEASUREMENTS: dict[str, Callable[[Workbench, Reporter], None]] = {
    "large-teacher": measure_large_teacher,
    "pool": measure_pool,
    "extraction": measure_extraction,
    "training": measure_steps,
    "sanitizer": run_sanitizer,
    "tests": run_marked_tests,
    "other-teachers": measure_other_teachers,
}


def serve(setting: GpuSetting, orders: TextIO, messages: TextIO) -> None:
    """Measure one part for each order, until there are none left."""

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    bench = Workbench(setting)
    try:
        send({"kind": "ready", "machine": _describe(bench)})
        for line in orders:
            order = json.loads(line)
            reporter = Reporter(send, time.monotonic() + order["seconds"])
            send(_outcome(MEASUREMENTS[order["part"]], bench, reporter))
    except ConfigError as error:
        send({"kind": "unable", "remark": str(error)})
    finally:
        bench.close()


def _outcome(measure: Callable[[Workbench, Reporter], None], bench: Workbench, reporter: Reporter) -> dict[str, Any]:
    try:
        measure(bench, reporter)
    except PartSkippedError as why:
        return {"kind": "skipped", "remark": str(why)}
    except Exception as error:  # noqa: BLE001 - whatever a part raises, the next ones run
        traceback.print_exc()
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"kind": "failed", "remark": first, "traceback": traceback.format_exc()}
    return {"kind": "done"}


def _describe(bench: Workbench) -> dict[str, Any]:
    """The device and what drives it."""
    found: dict[str, Any] = {"device": device_name(bench.device)}
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(bench.device)))
        found |= {"GiB": round(properties.total_memory / 2**30, 1), "capability": capability}
        found |= {"CUDA": torch.version.cuda, "cuDNN": cast(Any, torch.backends.cudnn).version()}
    return found


def _main() -> None:
    # Whatever prints, in this process or one that it starts, prints to standard error: standard output is for messages.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as in what a shell has in background
    with contextlib.suppress(KeyboardInterrupt):  # which ends it as it should
        serve(GpuSetting.from_json(sys.argv[1]), sys.stdin, messages)


if __name__ == "__main__":
    _main()
