"""A process that starts a pool and then waits, or ends as it is told; run by the tests of a pool's lifetime."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from typing import Any

import ray

from dinov3_ray import TeacherPool
from dinov3_ray.pool.cluster import connect
from dinov3_ray.testing import FakeTeacher

OPTIONS = {"replicas": 1, "num_cpus": 1, "threads": 1, "health_interval": 0.2}
ENDS = {
    "return": lambda: None,
    "os._exit": functools.partial(os._exit, 0),
    "ray.shutdown": lambda: (ray.shutdown(), sys.stdin.read()),
}


def start(name: str, **arguments: Any) -> int:
    """Start the pool, forget it, and say which process has done it."""
    TeacherPool.start(FakeTeacher.factory(), name=name, **OPTIONS, **arguments)
    return os.getpid()


class Starter:
    """An actor that starts a pool."""

    def start(self, name: str) -> int:
        return start(name)


def main(name: str, who: str) -> None:
    connect(os.environ["RAY_ADDRESS"])
    if who == "actor":
        actor = ray.remote(Starter).options(num_cpus=0).remote()
        pid = ray.get(actor.start.remote(name))
    elif who == "task":
        pid = ray.get(ray.remote(start).options(num_cpus=0, max_retries=0).remote(name))
    elif who == "thread":
        pid = os.getpid()
        thread = threading.Thread(target=start, args=(name,))
        thread.start()
        thread.join()
    else:
        pid = start(name, lifetime="detached" if who == "detached" else "process")
    if who == "parent" and not os.fork():
        time.sleep(300)  # as a DataLoader's worker that is busy: it has the connections of its parent
        os._exit(0)
    print(pid, flush=True)
    ENDS[sys.stdin.readline().strip()]()


if __name__ == "__main__":
    main(*sys.argv[1:])
