"""The Lightning callback under a real Trainer, with a pool in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_training import COUNT, SPEC, Scenes, Student, loader, train_and_check, trainer_with
from torch import Tensor, nn

from dinov3_ray import TeacherPool
from dinov3_ray.integrations.lightning import TeacherTargets
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training import recipes


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


class Distilling(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Conv2d(8, 2, 1))
        recipe = recipes.rtdetrv4(share=0.2, weight=1.0)
        self.distill = recipe.for_student(self.net, 16, torch.rand(1, 3, 64, 96), layers="0")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        task: Tensor = self.net(inputs["img"].float() / 255).square().mean()
        return task + self.distill(targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.slow
def test_a_recipes_distiller_is_tapped_and_kept_with_the_module(tmp_path: Path) -> None:
    student = Distilling()
    before = student.distill.terms.losses[0].projector.weight.clone()
    callback = TeacherTargets(FakeTeacher(), recipe="rtdetrv4")
    trainer = trainer_with(callback, tmp_path, max_epochs=2)
    trainer.fit(student, loader())
    assert student.distill.get_extra_state().tolist() == [2 * COUNT // 4, 1], "steps and the last epoch"
    assert student.distill.share.counted == 2 * COUNT // 4
    assert not torch.equal(student.distill.terms.losses[0].projector.weight, before)
    assert not student.distill.tap.attached, "left as it was found"
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Distilling.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.distill.weight == student.distill.weight
    assert again.distill.get_extra_state().tolist() == [12, 1]


@pytest.mark.parametrize("distils", [False, True])
def test_a_checkpoint_within_an_epoch_resumes_behind_the_last_step(distils: bool, tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    class Plain(Student):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if distils:
                return super().training_step(batch, batch_idx)
            self.seen += batch["index"].tolist()
            return self.net(batch["img"].float()).mean()

    def fit(folder: Path, checkpoint: Path | None = None) -> list[int]:
        torch.manual_seed(1)
        student = Plain()
        targets = [TeacherTargets(FakeTeacher(), SPEC, depth=4)] if distils else []
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1), *targets],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = stateful.StatefulDataLoader(Scenes(), batch_size=4, shuffle=True)
        trainer.fit(student, batches, ckpt_path=None if checkpoint is None else str(checkpoint))
        return student.seen

    seen = fit(tmp_path / "first")
    assert sorted(seen) == sorted(2 * list(range(COUNT)))
    assert fit(tmp_path / "second", tmp_path / "first" / "step=4.ckpt") == seen[16:]
