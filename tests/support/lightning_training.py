"""A student that Lightning trains, and checks each target against the view that it came with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from streams import picture
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov3_ray import Features, FeatureSpec
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


def train_and_check(folder: Path) -> None:
    """Three epochs with the pool named ``lightning``, which must run."""
    callback = TeacherTargets("lightning", SPEC)
    trainer, student = trainer_with(callback, folder, max_epochs=3), Student()
    trainer.fit(student, loader(shuffle=True), loader())
    assert sorted(student.seen) == sorted(3 * list(range(COUNT)))
    assert student.seen[:COUNT] != student.seen[COUNT : 2 * COUNT], "shuffled anew"
    assert student.validated >= 3 * COUNT
    (wrapped,) = callback.loaders
    assert wrapped.stream.statistics().steps == 3 * COUNT // 4
    assert {"teacher/wait_share", "teacher/depth", "teacher/resends"} <= set(trainer.callback_metrics)
    assert "process_dataloader" not in vars(trainer.strategy), "left as it was found"
