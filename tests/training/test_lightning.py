"""The Lightning callback under a real Trainer, with a pool in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning_training import COUNT, SPEC, Student, loader, train_and_check, trainer_with
from torch import Tensor

from dinov3_ray import TeacherPool
from dinov3_ray.integrations.lightning import TeacherTargets
from dinov3_ray.testing import FakeTeacher


def test_every_training_batch_comes_with_its_targets(tmp_path: Path) -> None:
    with TeacherPool.start(FakeTeacher.factory(), name="lightning", replicas=1, local_mode=True):
        train_and_check(tmp_path)


def test_stopping_in_mid_epoch_and_failing_leave_nothing_in_flight(tmp_path: Path) -> None:
    with TeacherPool.start(FakeTeacher.factory(), name="lightning", replicas=1, local_mode=True) as pool:
        remote = pool.teacher()
        student = Student()
        trainer_with(TeacherTargets(remote, SPEC), tmp_path, max_steps=8).fit(student, loader())
        assert student.seen == [*range(COUNT), *range(8)]
        assert remote.statistics().in_flight == remote.statistics().waiting == 0
        with pytest.raises(LookupError, match="the step failed"):
            trainer_with(TeacherTargets(remote, SPEC), tmp_path, max_epochs=1).fit(Student(fail_at=2), loader())
        assert remote.statistics().in_flight == remote.statistics().waiting == 0


def test_several_teachers(tmp_path: Path) -> None:
    class Both(Student):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            assert targets["small"].feature_map.shape[1] == 4
            return super().training_step((inputs, targets["large"]), batch_idx)

    teachers = {"large": FakeTeacher(), "small": FakeTeacher(hidden_size=4)}
    student = Both()
    trainer_with(TeacherTargets(teachers, SPEC), tmp_path, limit_train_batches=3, max_epochs=2).fit(student, loader())
    assert student.seen == 2 * list(range(12))
