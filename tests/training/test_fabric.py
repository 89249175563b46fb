"""Fabric's loop with a pool in this process: losses and optimizer steps are those of a teacher in the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric import Fabric
from loops import Batch, Step, images_of, in_the_loop, numbered_loader, student
from ranks import SPEC

from dinov3_ray import Features, RemoteTeacher, TeacherPool
from dinov3_ray.testing import FakeTeacher

pytestmark = pytest.mark.slow  # another trainer's loop, many times over

ACCUMULATE = 3


class Everyday:
    """A training loop as Fabric's documentation has it, which records its steps."""

    def __init__(self, count: int, precision: Any = "32-true") -> None:
        self.fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        self.model, self.optimizer = self.fabric.setup(*student())
        self.loader = self.fabric.setup_dataloaders(numbered_loader(count))
        self.steps: list[Step] = []

    def epoch(self, batches: Iterable[tuple[Batch, Features]], done: int = 0, stop_after: int | None = None) -> None:
        last = len(self.loader)
        for number, ((indices, images), targets) in enumerate(batches, done + 1):
            stepping = number % ACCUMULATE == 0 or number == last
            with self.fabric.no_backward_sync(self.model, enabled=not stepping):
                loss = self.model(images, targets)
                self.fabric.backward(loss / ACCUMULATE)
            if stepping:
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.steps.append((indices.tolist(), loss.item(), stepping))
            if number == stop_after:
                break


@pytest.fixture
def remote() -> Iterator[RemoteTeacher]:
    with TeacherPool.start(FakeTeacher.factory(), name="fabric", replicas=1, local_mode=True) as pool:
        yield pool.teacher()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("depth", [1, 6])
def test_losses_and_steps_are_those_of_a_teacher_in_the_loop(remote: RemoteTeacher, depth: int, precision: str) -> None:
    expected = Everyday(26, precision)
    for _ in range(2):
        expected.epoch(in_the_loop(FakeTeacher(), expected.loader))
    ours = Everyday(26, precision)
    batches = remote.prefetch(ours.loader, SPEC, images=images_of, depth=depth, device=ours.fabric.device)
    assert isinstance(batches, Sized)
    for _ in range(2):
        ours.epoch(batches)
    assert ours.steps == expected.steps


def test_a_run_resumes_within_an_epoch(remote: RemoteTeacher, tmp_path: Path) -> None:
    expected = Everyday(26)
    for _ in range(2):
        expected.epoch(in_the_loop(FakeTeacher(), expected.loader))

    stopped = Everyday(26)
    stopped.epoch(remote.prefetch(stopped.loader, SPEC, images=images_of, depth=4), stop_after=3)
    stopped.fabric.save(tmp_path / "state", {"model": stopped.model, "optimizer": stopped.optimizer})

    resumed = Everyday(26)
    resumed.fabric.load(tmp_path / "state", {"model": resumed.model, "optimizer": resumed.optimizer})
    rest = islice(resumed.loader, 3, None)
    resumed.epoch(remote.prefetch(rest, SPEC, images=images_of, depth=4), done=3)
    resumed.epoch(remote.prefetch(resumed.loader, SPEC, images=images_of, depth=4))
    assert stopped.steps + resumed.steps == expected.steps
