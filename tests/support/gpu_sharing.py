"""A pool and others share a cluster of two GPUs (Ray only counts them); prints what is said, and to whom."""

from __future__ import annotations

import json
import logging
from typing import Any

import ray
from click.testing import CliRunner
from ray.util.placement_group import placement_group, remove_placement_group
from waiting import until

from dinov3_ray import TeacherPool
from dinov3_ray.cli import main as command_line
from dinov3_ray.errors import ConfigError, PoolTimeoutError
from dinov3_ray.testing import FakeTeacher

OPTIONS: dict[str, Any] = {"name": "sharing", "threads": 1, "health_interval": 0.2}


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def start(**arguments: Any) -> TeacherPool:
    return TeacherPool.start(FakeTeacher.factory(), **OPTIONS, **arguments)


def notice(pool: TeacherPool) -> str:
    gpus = pool.status().gpus
    return gpus.notice if gpus else ""


def main() -> None:
    heard, seen = Heard(), {}
    logging.getLogger("dinov3_ray").addHandler(heard)
    ray.init(num_cpus=4, num_gpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)

    with start(replicas="auto", leave_gpus=1) as pool:
        seen["left"] = pool.status().target
        trainer = placement_group([{"GPU": 1}])
        ray.get(trainer.ready(), timeout=60)
        seen["nobody waits"] = notice(pool)
        remove_placement_group(trainer)
        seen["leave too many"] = refusal(ConfigError, leave_gpus=2)

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
    seen["pool waits"] = refusal(PoolTimeoutError, replicas="auto", timeout=15.0)
    print(json.dumps(seen))


def refusal(kind: type[Exception], **arguments: Any) -> str:
    try:
        start(**arguments)
    except kind as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    main()
