"""A pool and others share a cluster of two GPUs (Ray only counts them); prints what is said, and to whom."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import ray
from click.testing import CliRunner
from lean_ray import start_lean_rays
from ray.util.placement_group import placement_group, remove_placement_group
from waiting import until

from dinov3_ray import TeacherPool
from dinov3_ray.cli import main as command_line
from dinov3_ray.errors import ConfigError, PoolTimeoutError
from dinov3_ray.pool.cluster import process_start
from dinov3_ray.pool.control.process_end import living_threads
from dinov3_ray.testing import FakeTeacher

OPTIONS: dict[str, Any] = {"name": "sharing", "threads": 1, "health_interval": 0.2}


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Tenant(FakeTeacher):
    """Writes down which processes its GPU still has when it moves in, and says how torch is to take memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__(fingerprint=os.environ.get("PYTORCH_ALLOC_CONF", "nothing set"))
        (gpu,) = ray.get_gpu_ids()
        others = [path.name for path in folder.glob(f"{gpu}-*") if Path(f"/proc/{path.name.split('-')[1]}").exists()]
        (folder / f"{gpu}-{os.getpid()}").write_text(" ".join(others))


def start(**arguments: Any) -> TeacherPool:
    return TeacherPool.start(FakeTeacher.factory(), **OPTIONS, **arguments)


def notice(pool: TeacherPool) -> str:
    gpus = pool.status().gpus
    return gpus.notice if gpus else ""


def wait_for_free_gpus(number: int) -> None:
    """Wait until Ray's head knows how many GPUs are free, by which ``"auto"`` goes: nodes report that now and then."""
    until(lambda: ray.available_resources().get("GPU", 0) == number, f"{number} GPUs are free")


def main() -> None:
    heard, seen = Heard(), {}
    start_lean_rays()
    logging.getLogger("dinov3_ray").addHandler(heard)
    ray.init(num_cpus=4, num_gpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)

    with start(replicas="auto", leave_gpus=1) as pool:
        seen["left"] = pool.status().target
        trainer = placement_group([{"GPU": 1}])
        ray.get(trainer.ready(), timeout=60)
        seen["nobody waits"] = notice(pool)
        remove_placement_group(trainer)
        seen["leave too many"] = refusal(ConfigError, leave_gpus=2)

    wait_for_free_gpus(2)
    with start(replicas="auto") as pool:
        seen["taken"] = pool.status().target
        trainer = placement_group([{"GPU": 1, "CPU": 1}])
        until(lambda: "sharing: others wait for 1 GPU" in "\n".join(heard.lines), "this process is told")
        seen["trainer waits"] = notice(pool)
        seen["status"] = CliRunner().invoke(command_line, ["status", "--name", "sharing"]).output
        pool.scale(1)
        ray.get(trainer.ready(), timeout=60)
        until(lambda: not notice(pool), "nobody waits any more")
        remove_placement_group(trainer)

    trainer = placement_group([{"GPU": 2}])
    ray.get(trainer.ready(), timeout=60)
    wait_for_free_gpus(0)
    seen["pool waits"] = refusal(PoolTimeoutError, replicas="auto", timeout=15.0)
    remove_placement_group(trainer)

    folder = Path(tempfile.mkdtemp(prefix="dr-"))
    with TeacherPool.start(
        functools.partial(Tenant, folder), replicas=2, health_timeout=2.0, startup_timeout=30.0, **OPTIONS
    ) as pool:
        seen["segments"] = pool.status().fingerprint
        stopped = pool.status().replicas[0].pid
        assert stopped is not None
        started = process_start(stopped)
        os.kill(stopped, signal.SIGSTOP)
        until(lambda: len(list(folder.iterdir())) == 3, "the stopped replica's GPU has another tenant")
        seen["double tenants"] = [path.read_text() for path in folder.iterdir() if path.read_text()]
        seen["stopped is gone"] = not living_threads(stopped, started)
    print(json.dumps(seen))


def refusal(kind: type[Exception], **arguments: Any) -> str:
    try:
        start(**arguments)
    except kind as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    main()
