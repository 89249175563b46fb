"""A loop in torch alone with a pool in this process: losses and optimizer steps are those of a teacher in the loop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Batch, Step, images_of, in_the_loop, numbered_loader, student
from ranks import SPEC, Numbered

from dinov3_ray import Features, TeacherPool
from dinov3_ray.testing import FakeTeacher

COUNT = 26
ACCUMULATE = 3


class Everyday:
    def __init__(self) -> None:
        self.model, self.optimizer = student()
        self.steps: list[Step] = []

    def epoch(self, batches: Iterable[tuple[Batch, Features]], done: int = 0, stop_after: int | None = None) -> None:
        for number, ((indices, images), targets) in enumerate(batches, done + 1):
            loss = self.model(images, targets)
            loss.backward()
            stepping = number % ACCUMULATE == 0
            if stepping:
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.steps.append((indices.tolist(), loss.item(), stepping))
            if number == stop_after:
                break

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def stateful_loader() -> Any:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    return stateful.StatefulDataLoader(
        Numbered(COUNT), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7)
    )


@pytest.mark.parametrize("depth", [1, 3, "auto"])
def test_losses_and_steps_are_those_of_a_teacher_in_the_loop(local_pool: TeacherPool, depth: Any) -> None:
    expected, loader = Everyday(), numbered_loader(COUNT)
    ours = Everyday()
    batches = local_pool.teacher().prefetch(numbered_loader(COUNT), SPEC, images=images_of, depth=depth)
    for _ in range(2):
        expected.epoch(in_the_loop(FakeTeacher(), loader))
        ours.epoch(batches)
    assert ours.steps == expected.steps


@pytest.mark.parametrize("depth", [1, 3, "auto"])
def test_a_run_resumes_within_an_epoch(local_pool: TeacherPool, tmp_path: Path, depth: Any) -> None:
    expected = Everyday()
    expected.epoch(in_the_loop(FakeTeacher(), stateful_loader()))
    remote = local_pool.teacher()
    stopped = Everyday()
    batches = remote.prefetch(stateful_loader(), SPEC, images=images_of, depth=depth)
    stopped.epoch(batches, stop_after=3)
    torch.save({**stopped.state(), "batches": batches.state_dict()}, tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=False)
    resumed = Everyday()
    resumed.load(state)
    batches = remote.prefetch(stateful_loader(), SPEC, images=images_of, depth=depth)
    batches.load_state_dict(state["batches"])
    resumed.epoch(batches, done=3)
    assert stopped.steps + resumed.steps == expected.steps
