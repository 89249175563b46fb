"""A training loop that Ray Train runs in its workers. Light to import: the workers do it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from loops import CHANNELS, images_of, in_the_loop
from ranks import SPEC, Distilled, Numbered
from ray.train.torch import prepare_data_loader, prepare_model
from torch.utils.data import DataLoader

from dinov3_ray import RemoteTeacher
from dinov3_ray.testing import FakeTeacher

EPOCHS = 2
COUNT = 22
ACCUMULATE = 2


class Everyday:
    """A loop with DDP, which records its steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = prepare_model(Distilled(CHANNELS))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.loader = prepare_data_loader(DataLoader(Numbered(COUNT), batch_size=3, shuffle=True))
        self.steps: list[tuple[list[int], float]] = []

    def epoch(self, number: int, batches: Any, fail: bool = False) -> None:
        self.loader.sampler.set_epoch(number)
        for count, ((indices, images), targets) in enumerate(batches, 1):
            loss = self.model(images, targets)
            loss.backward()
            if count % ACCUMULATE == 0 or count == len(self.loader):
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.steps.append((indices.tolist(), loss.item()))
            if fail:
                raise LookupError("the worker failed")

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


def train(settings: dict[str, Any]) -> None:
    """Train with the pool of the settings, then again with a local teacher in the loop; leaves both runs' steps.

    The first worker fails once within the last epoch. Ray Train begins again from the last checkpoint.
    """
    torch.set_num_threads(1)
    rank, folder = ray.train.get_context().get_world_rank(), Path(settings["folder"])
    ours, first = Everyday(), 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            ours.load(torch.load(Path(saved) / f"{rank}.pt"))
        first = 1
    with RemoteTeacher(settings["pool"]) as teacher:
        batches = teacher.prefetch(ours.loader, SPEC, images=images_of)
        for epoch in range(first, EPOCHS):
            ours.epoch(epoch, batches, fail=checkpoint is None and epoch == EPOCHS - 1 and rank == 0)
            with tempfile.TemporaryDirectory() as saving:
                torch.save(ours.state(), Path(saving) / f"{rank}.pt")
                ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(saving))
        assert teacher.statistics().in_flight == 0
    expected = Everyday()
    for epoch in range(EPOCHS):
        expected.epoch(epoch, in_the_loop(FakeTeacher(), expected.loader))
    resumed = checkpoint is not None
    torch.save({"ours": ours.steps, "expected": expected.steps, "resumed": resumed}, folder / f"{rank}.pt")
