"""Lightning's Trainer with a pool in this process: losses and optimizer steps are those of a teacher in the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from loops import images_of, numbered_loader, student
from ranks import SPEC
from torch import Tensor

from dinov3_ray import TeacherPool
from dinov3_ray.integrations.lightning import TeacherTargets
from dinov3_ray.testing import FakeTeacher

pytestmark = pytest.mark.slow  # another trainer's loop, many times over


class Everyday(LightningModule):
    """Records each batch with its loss, and after how many batches the optimizer stepped."""

    def __init__(self, in_the_loop: bool) -> None:
        super().__init__()
        self.model, self._optimizer = student()
        self.in_the_loop = in_the_loop
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.in_the_loop:
            targets = FakeTeacher().extract(images_of(batch), SPEC).map(lambda _, tensor: tensor.to(self.dtype))
        else:
            batch, targets = batch
        loss: Tensor = self.model(images_of(batch), targets)
        self.seen.append((batch[0].tolist(), loss.item()))
        return loss

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append("step")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._optimizer


def run(folder: Path, in_the_loop: bool, epochs: int, resume: Path | None = None, **options: Any) -> Everyday:
    module = Everyday(in_the_loop)
    callbacks: list[Any] = [ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)]
    if not in_the_loop:
        callbacks.append(TeacherTargets("lightning", SPEC, images=images_of))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=3,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, numbered_loader(26), ckpt_path=resume)
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_losses_and_steps_are_those_of_a_teacher_in_the_loop(tmp_path: Path, precision: Any) -> None:
    with TeacherPool.start(FakeTeacher.factory(), name="lightning", replicas=1, local_mode=True):
        expected = run(tmp_path / "loop", True, 2, precision=precision)
        ours = run(tmp_path / "ours", False, 2, precision=precision)
    assert ours.seen == expected.seen
    assert ours.seen.count("step") == 2 * 3  # of 7 batches an epoch


def test_a_run_resumes(tmp_path: Path) -> None:
    with TeacherPool.start(FakeTeacher.factory(), name="lightning", replicas=1, local_mode=True):
        run(tmp_path, False, 1)
        ours = run(tmp_path / "ours", False, 2, resume=tmp_path / "epoch=0.ckpt")
        expected = run(tmp_path / "loop", True, 2, resume=tmp_path / "epoch=0.ckpt")
    assert ours.seen == expected.seen
    assert ours.seen.count("step") == 3
