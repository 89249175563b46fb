"""A training script that starts its own pool, as each rank of a torchrun runs it; see test_torchrun.py.

Usage: rank_pool.py FOLDER EXIST. Rank 0 leaves first, and the others go on when its process is gone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from waiting import until

from dinov3_ray import FeatureSpec, TeacherPool
from dinov3_ray.testing import FakeTeacher

SPEC = FeatureSpec(cls=True)
BATCHES = 5


def main(folder: Path, exist: str) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    with TeacherPool.start(
        FakeTeacher.factory(hidden_size=16),
        name="ranks",
        exist=exist,  # type: ignore[arg-type]
        replicas=1,
        num_cpus=1,
        threads=1,
    ) as pool:
        status, address = pool.status(), ray.get_runtime_context().gcs_address
        remote = pool.teacher()
        if rank != 0:
            # Rank 0 has left the pool, and its process has ended.
            until(lambda: (folder / "rank0.json").exists(), "rank 0 has ended")
            first = json.loads((folder / "rank0.json").read_text())["pid"]
            until(lambda: not Path(f"/proc/{first}/fd").exists() or _is_dead(first), "its process is gone", 60)
        generator = torch.Generator().manual_seed(rank)
        right = 0
        for _ in range(BATCHES):
            images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
            expected = FakeTeacher(hidden_size=16).extract(images, SPEC)
            right += torch.equal(remote.extract(images, SPEC).cls, expected.cls)
    report = {
        "rank": rank,
        "right": right,
        "ray": address,
        "replica": status.replicas[0].pid,
        "pid": os.getpid(),
    }
    draft = folder / f"rank{rank}.tmp"
    draft.write_text(json.dumps(report))
    draft.rename(folder / f"rank{rank}.json")
    if rank == 0:
        os._exit(0)  # without a word to the others


def _is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
