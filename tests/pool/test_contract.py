"""The contract of every teacher, for those that need no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from teacher_contract import TeacherContract

from dinov3_ray import DinoV3Config, DinoV3Teacher, TeacherPool
from dinov3_ray.teacher import Teacher
from dinov3_ray.testing import FakeTeacher


@pytest.fixture(scope="module", params=["fake", "local", "local-mode"])
def teacher(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Iterator[Teacher]:
    config = DinoV3Config(tiny_checkpoint, dtype="float32")
    if request.param == "fake":
        yield FakeTeacher(hidden_size=128, image_size=(224, 224), depth=3)
    elif request.param == "local":
        yield DinoV3Teacher(config, "cpu")
    else:
        with TeacherPool.start(config, name="contract", replicas=2, local_mode=True) as pool:
            yield pool.teacher()


class TestContract(TeacherContract):
    pass
