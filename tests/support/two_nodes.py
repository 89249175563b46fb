"""A cluster of two worker nodes on this machine; one is killed under load, another joins. Run by test_cluster.py.

A script of its own, since a process can be connected to one Ray only.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster
from streams import numbered
from waiting import until

from dinov3_ray import FeatureSpec, TeacherPool
from dinov3_ray.pool.control.status import PoolStatus
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True, feature_map=True)
BATCHES = 200


view = partial(numbered, rows=4, size=(64, 64))


def kill_node(node: object) -> None:
    """End a node as a power cut would: its raylet and all its workers, at once, without a word."""
    raylets = [info.process for infos in node.all_processes.values() for info in infos]  # type: ignore[attr-defined]
    pids = {process.pid for process in raylets}
    children = {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _parent(int(pid)) in pids}
    for pid in pids | children:
        os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def whole_without(pool: TeacherPool, node_id: str) -> PoolStatus:
    """The pool once it is whole. It may be some seconds until its controller misses those of the dead node."""
    until(
        lambda: all(one.node_id != node_id for one in pool.status().replicas),
        lambda: f"no replica of the dead node is listed: {pool.status()}",
    )
    return pool.wait_ready(120)


def main(folder: Path) -> None:
    resources = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 100 * 2**20,
            "temp_dir": str(folder / "ray"),
            # By default Ray takes a quarter of a minute to miss a machine that went without a word.
            "_system_config": {"health_check_period_ms": 500},
        },
    )
    try:
        first, _ = (cluster.add_node(wait=False, **resources) for _ in range(2))
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        # Two replicas a node: each reserves a CPU, and the head has none.
        options = {"num_cpus": 1, "health_interval": 0.5, "health_timeout": 15.0}
        with TeacherPool.start(FakeTeacher.factory(delay=0.05), name="nodes", replicas=4, **options) as pool:
            before = {one.node_id for one in pool.status().replicas}
            stream = pool.teacher().prefetch(range(BATCHES), SPEC, images=view)
            answers, killed_at, gap, last = [], 0.0, 0.0, time.monotonic()
            for number, features in stream:
                answers.append((number, features))
                now = time.monotonic()
                gap, last = max(gap, now - last), now
                if number == 40:
                    kill_node(first)
                    killed_at = now
                if number == 80:
                    cluster.add_node(**resources)
            status = whole_without(pool, first.node_id)
        teacher = FakeTeacher()
        wrong = [
            number
            for number, features in answers
            if not torch.equal(features.feature_map, teacher.extract(view(number), SPEC).feature_map)
        ]
        report = {
            "order": [number for number, _ in answers] == list(range(BATCHES)),
            "wrong": wrong,
            "nodes_before": len(before),
            "nodes_after": len({one.node_id for one in status.replicas}),
            "new_node_used": not {one.node_id for one in status.replicas} <= before,
            "ready": status.ready,
            "longest_gap_seconds": round(gap, 2),
            "whole_again_after_seconds": round(time.monotonic() - killed_at, 2),
        }
        # Not printed: Ray's own last words may follow on the standard output.
        (folder / "report.json").write_text(json.dumps(report))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
