"""The Lightning callback under a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from streams import picture
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov3_ray import Features, FeatureSpec, TeacherPool
from dinov3_ray.integrations.lightning import TeacherTargets
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training.losses import DistillationLoss

SPEC = FeatureSpec(feature_map=True)
COUNT = 24


class Scenes(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"img": picture(index, (64, 96)), "index": index}


class Student(LightningModule):
    """Checks every target against the view it came with."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 8, 16, 16)
        self.distill = DistillationLoss("cosine", projector=nn.Conv2d(8, 16, 1))
        self.fail_at = fail_at
        self.seen: list[int] = []
        self.validated = 0

    def training_step(self, batch: tuple[dict[str, Tensor], Features], batch_idx: int) -> Tensor:
        inputs, targets = batch
        expected = FakeTeacher().extract(inputs["img"], SPEC)
        assert targets.feature_map is not None
        assert expected.feature_map is not None
        assert torch.equal(targets.feature_map, expected.feature_map)
        self.seen += inputs["index"].tolist()
        if batch_idx == self.fail_at:
            raise LookupError("the step failed")
        return self.distill(self.net(inputs["img"].float() / 255), targets)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated += len(batch["img"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_with(callback: TeacherTargets, folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader(**options: Any) -> DataLoader[dict[str, Any]]:
    return DataLoader(Scenes(), batch_size=4, **options)


@pytest.mark.parametrize("local_mode", [True, False], ids=["local-mode", "ray"])
def test_every_training_batch_comes_with_its_targets(
    request: pytest.FixtureRequest, tmp_path: Path, local_mode: bool
) -> None:
    if not local_mode:
        request.getfixturevalue("ray_cluster")
    with TeacherPool.start(FakeTeacher.factory(), name="lightning", replicas=1, local_mode=local_mode):
        callback = TeacherTargets("lightning", SPEC)
        trainer, student = trainer_with(callback, tmp_path, max_epochs=3), Student()
        trainer.fit(student, loader(shuffle=True), loader())
        assert sorted(student.seen) == sorted(3 * list(range(COUNT)))
        assert student.seen[:COUNT] != student.seen[COUNT : 2 * COUNT], "shuffled anew"
        assert student.validated >= 3 * COUNT
        (wrapped,) = callback.loaders
        assert wrapped.stream.statistics().steps == 3 * COUNT // 4
        assert {"teacher/wait_share", "teacher/depth", "teacher/resends"} <= set(trainer.callback_metrics)
        assert "process_dataloader" not in vars(trainer.strategy), "left as it was found"


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
