"""Steps that are left and resumed: weights, optimizer and random numbers of an undisturbed run, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from detectors import equal_weights
from students import small

from dinov3_ray.distillation.run_folder import RunFolder
from dinov3_ray.distillation.student_backbone import PLAIN, StudentBackbone
from dinov3_ray.distillation.training_run import Schedule, TrainingRun, choose_amp
from dinov3_ray.errors import ConfigError, NumericsError
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training import recipes

SIZE = (64, 64)
STEPS = 6
CPU = torch.device("cpu")


def run_of(seed: int, recipe: str = "lightly", amp: torch.dtype | None = None) -> TrainingRun:
    torch.manual_seed(seed)
    backbone = StudentBackbone(small(), statistics=PLAIN, size=SIZE)
    example = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
    distiller = recipes.get(recipe).for_student(backbone, FakeTeacher(), example, layers=backbone.last_level)
    distiller.tap.attach()
    return TrainingRun(backbone, distiller, Schedule(0.01, STEPS, 2), weight_decay=0.1, device=CPU, amp=amp)


def train(run: TrainingRun, steps: int) -> None:
    teacher = FakeTeacher()
    for _ in range(steps):
        views = torch.randint(
            0, 256, (4, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(run.step)
        )
        run.do_step(views, teacher.extract(views, run.distiller.spec))


@pytest.mark.parametrize(
    ("recipe", "amp"), [("lightly", None), ("am_radio", None), ("ultralytics", torch.bfloat16), ("gram", None)]
)
def test_a_run_goes_on_from_its_state_as_if_it_had_never_stopped(
    recipe: str, amp: torch.dtype | None, tmp_path: Path
) -> None:
    whole = run_of(0, recipe, amp)
    torch.manual_seed(5)
    train(whole, STEPS)
    first = run_of(0, recipe, amp)
    torch.manual_seed(5)
    train(first, 4)
    RunFolder(tmp_path).save(first.state_dict())
    later = run_of(1, recipe, amp)  # other weights, and other random numbers
    state = RunFolder(tmp_path).checkpoint()
    assert state is not None
    later.load_state_dict(state)
    assert (later.step, later.rate, later.mean_loss()) == (4, first.rate, first.mean_loss())
    train(later, STEPS - 4)
    assert equal_weights(later.student, whole.student)
    mine, other = later.distiller.state_dict(), whole.distiller.state_dict()
    assert mine.keys() == other.keys()
    assert all(
        torch.equal(mine[name], value) if torch.is_tensor(value) else mine[name] == value
        for name, value in other.items()
    )
    assert later.mean_loss() == whole.mean_loss()
    assert not equal_weights(later.student, first.student)


def test_the_rate_rises_and_falls() -> None:
    schedule = Schedule(2.0, 12, 2)
    rates = [schedule.rate(step) for step in range(12)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[7] == pytest.approx(1.0)
    assert sorted(rates[2:], reverse=True) == rates[2:]
    assert 0 < rates[-1] < 0.1


def test_a_loss_that_is_not_finite_is_an_error_and_is_not_saved() -> None:
    run = run_of(0)
    train(run, 1)
    with torch.no_grad():
        next(run.student.parameters()).fill_(math.inf)
    train(run, 1)
    with pytest.raises(NumericsError, match=r"loss must be finite; it is nan by step 2 .*with another OUT"):
        run.state_dict()


def test_autocast_is_off_on_a_cpu_unless_it_is_asked_for() -> None:
    assert choose_amp("auto", CPU) is None
    assert choose_amp("bfloat16", CPU) is torch.bfloat16
    with pytest.raises(ConfigError, match="must be another than 'float16' on cpu"):
        choose_amp("float16", CPU)
