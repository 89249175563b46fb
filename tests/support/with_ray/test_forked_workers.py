"""The tests' workers are forked, and otherwise as Ray starts them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import ray
from waiting import until

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests


def look() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "nice": os.nice(0),
        "parent": Path(f"/proc/{os.getppid()}/cmdline").read_text(),
        "program": sys.argv[0],
        "folder": os.getcwd(),
        "job": (os.environ["RAY_JOB_ID"], ray.get_runtime_context().get_job_id()),
        "given": os.environ.get("DINOV3_GIVEN"),
    }


def test_a_forked_worker_is_as_one_that_ray_started(ray_cluster: str) -> None:
    looking = ray.remote(look)
    forked = ray.get(looking.remote())
    started = ray.get(looking.options(runtime_env={"env_vars": {"DINOV3_GIVEN": "yes"}}).remote())
    assert "forked_workers.py" in forked.pop("parent")
    assert "raylet" in started.pop("parent")
    assert (forked.pop("given"), started.pop("given")) == (None, "yes")
    pids = [worker.pop("pid") for worker in (forked, started)]
    assert [worker.pop("group") for worker in (forked, started)] == pids, "each leads a group of its own"
    assert forked == started
    assert forked["job"] == (ray.get_runtime_context().get_job_id(),) * 2
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pids[0]}").exists(), "it has ended, and nobody has to bury it", 30)
    assert ray.get(looking.remote())["pid"] not in pids
