"""The contract of every teacher, for those that need no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from teacher_contract import TeacherContract
from transformers_models import KINDS, write_transformers

from dinov3_ray import TeacherPool
from dinov3_ray.config import open_config
from dinov3_ray.model import open_teacher
from dinov3_ray.teacher import Teacher
from dinov3_ray.testing import FakeTeacher


@pytest.fixture(scope="module", params=["fake", "local", "local-mode", "transformers", "transformers-local-mode"])
def teacher(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Teacher]:
    root = tiny_checkpoint
    if request.param.startswith("transformers"):
        root = write_transformers(tmp_path_factory.mktemp("contract") / "model", *KINDS["contract"])
    config = open_config(root, dtype="float32")
    if request.param == "fake":
        yield FakeTeacher(hidden_size=128, image_size=(224, 224), depth=3)
    elif request.param in ("local", "transformers"):
        yield open_teacher(config, "cpu")
    else:
        with TeacherPool.start(config, name="contract", replicas=2, local_mode=True) as pool:
            yield pool.teacher()


class TestContract(TeacherContract):
    pass
