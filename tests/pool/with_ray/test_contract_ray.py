"""The contract of every teacher, for one in a pool of Ray actors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from teacher_contract import TeacherContract

from dinov3_ray import DinoV3Config, TeacherPool
from dinov3_ray.teacher import Teacher


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Path, ray_cluster: str) -> Iterator[Teacher]:
    config = DinoV3Config(tiny_checkpoint, dtype="float32")
    with TeacherPool.start(config, name="contract", replicas=1) as pool:
        yield pool.teacher()


class TestContract(TeacherContract):
    pass
