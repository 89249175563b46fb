"""accelerate's loop with a pool in this process: losses and optimizer steps are those of a teacher in the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Batch, Step, images_of, in_the_loop, numbered_loader, student
from ranks import SPEC

from dinov3_ray import Features, RemoteTeacher, TeacherPool
from dinov3_ray.testing import FakeTeacher

accelerate = pytest.importorskip("accelerate")

Wrap = Callable[[Iterable[Batch]], Iterable[tuple[Batch, Features]]]


class Everyday:
    """A training loop as accelerate's documentation has it, which records its steps."""

    def __init__(self, count: int, accumulate: int) -> None:
        seedable = accelerate.DataLoaderConfiguration(use_seedable_sampler=True)
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, dataloader_config=seedable
        )
        accelerate.utils.set_seed(3)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(*student(), numbered_loader(count))
        self.steps: list[Step] = []

    def epoch(self, batches: Iterable[tuple[Batch, Features]], stop_after: int | None = None) -> None:
        for number, ((indices, images), targets) in enumerate(batches, 1):
            with self.accelerator.accumulate(self.model):
                loss = self.model(images, targets)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.steps.append((indices.tolist(), loss.item(), self.accelerator.sync_gradients))
            if number == stop_after:
                break


@pytest.fixture
def remote() -> Iterator[RemoteTeacher]:
    with TeacherPool.start(FakeTeacher.factory(), name="accelerate", replicas=1, local_mode=True) as pool:
        yield pool.teacher()


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 6, "auto"])
@pytest.mark.parametrize(("count", "accumulate"), [(4, 4), (40, 1), (45, 4), (48, 4), (26, 3)])
def test_losses_and_steps_are_those_of_a_teacher_in_the_loop(
    remote: RemoteTeacher, count: int, accumulate: int, depth: Any
) -> None:
    expected = Everyday(count, accumulate)
    for _ in range(3):
        expected.epoch(in_the_loop(FakeTeacher(), expected.loader))
    ours = Everyday(count, accumulate)
    batches = remote.prefetch(ours.loader, SPEC, images=images_of, depth=depth)
    for _ in range(3):
        ours.epoch(batches)
    assert ours.steps == expected.steps
    assert ours.steps[-1][2], "the last batch of an epoch ends an optimizer step"


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 6])
def test_a_run_resumes_within_an_epoch(remote: RemoteTeacher, tmp_path: Path, depth: int) -> None:
    expected = Everyday(45, 2)
    for _ in range(2):
        expected.epoch(in_the_loop(FakeTeacher(), expected.loader))

    stopped = Everyday(45, 2)
    stopped.epoch(remote.prefetch(stopped.loader, SPEC, images=images_of, depth=depth), stop_after=6)
    stopped.accelerator.save_state(str(tmp_path))

    resumed = Everyday(45, 2)
    resumed.accelerator.load_state(str(tmp_path))
    rest = resumed.accelerator.skip_first_batches(resumed.loader, 6)
    resumed.epoch(remote.prefetch(rest, SPEC, images=images_of, depth=depth))
    resumed.loader.set_epoch(1)
    resumed.epoch(remote.prefetch(resumed.loader, SPEC, images=images_of, depth=depth))
    assert stopped.steps + resumed.steps == expected.steps


def test_an_evaluation_between_epochs_counts_each_sample_once(remote: RemoteTeacher) -> None:
    run = Everyday(18, 2)
    evaluation = run.accelerator.prepare(numbered_loader(10))
    batches = remote.prefetch(run.loader, SPEC, images=images_of, depth=4)
    for _ in range(2):
        run.epoch(batches)
        gathered = [run.accelerator.gather_for_metrics(indices) for indices, _ in evaluation]
        assert sorted(torch.cat(gathered).tolist()) == list(range(10))
