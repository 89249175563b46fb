"""The Lightning callback under a real Trainer, with a pool of Ray actors."""

from __future__ import annotations

from pathlib import Path

from lightning_training import train_and_check

from dinov3_ray import TeacherPool
from dinov3_ray.testing import FakeTeacher


def test_every_training_batch_comes_with_its_targets(ray_cluster: str, tmp_path: Path) -> None:
    with TeacherPool.start(FakeTeacher.factory(), name="lightning", replicas=1):
        train_and_check(tmp_path)
