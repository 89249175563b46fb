"""The weight that finds itself, against gradients that autograd gives for each loss alone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import SUPPORT
from share_ranks import STEPS, Student, batch_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import ModelOutput

from dinov3_ray import Features
from dinov3_ray.errors import ConfigError
from dinov3_ray.training import recipes
from dinov3_ray.training.distiller import Distiller
from dinov3_ray.training.losses import GradientShare, PhiS, WeightSchedule

SHARE = 0.2
ODDS = SHARE / (1 - SHARE)


def norms(student: nn.Sequential, distiller: Distiller, images: Tensor, targets: Features) -> tuple[float, float]:
    """The norms of the task's and of the distillation's gradient at the tapped tensor, each by itself, at weight 1."""
    tapped = student[1](student[0](images)).detach().requires_grad_()
    task = torch.autograd.grad(task_of(student[2](tapped)), tapped)[0].norm()
    own = torch.autograd.grad(distiller.terms({"1": tapped}, targets), tapped)[0].norm()
    return float(task), float(own)


def task_of(output: Tensor) -> Tensor:
    return output.square().mean()


def pair(seed: int = 0, **options: Any) -> tuple[nn.Sequential, Distiller]:
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Tanh(), nn.Conv2d(8, 2, 1))
    recipe = recipes.rtdetrv4(**{"weight": 1.0, "share": SHARE, **options})
    return student, recipe.for_student(student, 4, torch.rand(1, 3, 64, 64), layers="1")


def batch(step: int = 0) -> tuple[Tensor, Features]:
    images, targets, _ = batch_of(step, 0)
    return images, targets


def step(
    student: nn.Module,
    distiller: Distiller,
    images: Tensor,
    targets: Features,
    backward: Callable[[Tensor, Tensor], None] = lambda task, own: (task + own).backward(),
) -> None:
    with distiller.tap:
        task = task_of(student(images))
        backward(task, distiller(targets))


def test_the_weight_gives_the_distillation_its_share_of_the_gradient() -> None:
    student, distiller = pair()
    images, targets = batch()
    for _ in range(5):
        step(student, distiller, images, targets)
    task, own = norms(student, distiller, images, targets)
    assert distiller.weight == pytest.approx(ODDS * task / own, rel=1e-4)
    assert distiller.weight * own / (distiller.weight * own + task) == pytest.approx(SHARE, rel=1e-4)
    assert distiller.share is not None
    assert float(distiller.share.measured()) == pytest.approx(SHARE, rel=1e-4)


def test_the_weight_changes_no_gradient_of_its_own_step() -> None:
    student, distiller = pair()
    images, targets = batch()
    with distiller.tap:
        (task_of(student(images)) + distiller(targets)).backward()
    twin, plain = pair(share=None)
    with plain.tap:
        (task_of(twin(images)) + plain(targets)).backward()
    found = [each.grad for each in [*student.parameters(), *distiller.parameters()]]
    assert all(torch.equal(a, b.grad) for a, b in zip(found, [*twin.parameters(), *plain.parameters()], strict=True))


def test_it_follows_the_geometric_mean_of_the_steps_and_forgets_the_oldest() -> None:
    student, distiller = pair()
    assert distiller.share is not None
    distiller.share.memory = 3
    mean = 0.0
    for number in range(8):
        images, targets = batch(number)
        task, own = norms(student, distiller, images, targets)
        mean += (torch.log(torch.tensor(task / own)).item() - mean) / min(number + 1, 3)
        step(student, distiller, images, targets)
        assert float(distiller.share.log_ratio) == pytest.approx(mean, abs=1e-4)


def test_a_warm_up_is_a_factor_beside_the_weight_that_the_share_finds() -> None:
    student, distiller = pair(schedule=WeightSchedule(warmup=4))
    assert distiller.share is not None
    ratios = []
    for number in range(6):
        images, targets = batch(number)
        task, own = norms(student, distiller, images, targets)
        ratios.append(float(torch.tensor(task / own).log()))
        step(student, distiller, images, targets)
        mean = sum(ratios) / len(ratios)
        assert float(distiller.share.log_ratio) == pytest.approx(mean, abs=1e-4), "of the loss at weight 1"
        found = ODDS * float(torch.tensor(mean).exp())
        assert distiller.weight == pytest.approx(min((number + 2) / 4, 1) * found, rel=1e-3)


def test_accumulated_batches_count_each_by_its_own_norms() -> None:
    student, distiller = pair()
    assert distiller.share is not None
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.05)
    ratios: list[float] = []
    for first in (0, 3):  # two steps of three batches
        expected = [torch.zeros_like(each) for each in student[0].parameters()]
        for number in range(first, first + 3):
            images, targets = batch(number)
            images, targets = images * (number + 1), targets.map(lambda _, t, by=number + 1: t + by)  # type: ignore[misc]
            task, own = norms(student, distiller, images, targets)
            ratios.append(float(torch.tensor(task / own).log()))
            tapped = student[:2](images)
            loss = task_of(student[2](tapped)) + distiller.weight * distiller.terms({"1": tapped}, targets)
            for total, gradient in zip(
                expected, torch.autograd.grad(loss / 3, [*student[0].parameters()]), strict=True
            ):
                total += gradient
            step(student, distiller, images, targets, lambda task, own: ((task + own) / 3).backward())
            assert float(distiller.share.log_ratio) == pytest.approx(sum(ratios) / len(ratios), abs=1e-4)
        for parameter, total in zip(student[0].parameters(), expected, strict=True):
            assert torch.allclose(parameter.grad, total, atol=1e-6), "each by the weight of its batch"
        optimizer.step()
        optimizer.zero_grad()
    assert distiller.share.counted == 6
    assert max(ratios) - min(ratios) > 0.5, "the batches differ"


def gam(weight: float, percentage: float, target: float) -> float:
    """RT-DETRv4's det_solver: the weight at which a loss with ``percentage`` of the gradient has ``target`` percent."""
    now, wanted = percentage / 100, target / 100
    ratio = max(wanted * (1 - now) / (now * (1 - wanted)), 0.1)
    return min(max(weight * ratio, weight / 10), weight * 10)


@pytest.mark.parametrize("weight", [0.3, 5.0, 100.0, 1e4])
def test_a_step_is_that_of_rt_detr_v4s_adaptive_weight(weight: float) -> None:
    student, distiller = pair(weight=weight)
    images, targets = batch()
    task, own = norms(student, distiller, images, targets)
    percentage = 100 * weight * own / (weight * own + task)
    step(student, distiller, images, targets)
    assert distiller.weight == pytest.approx(gam(weight, percentage, 100 * SHARE), rel=1e-3)


def test_factors_on_the_whole_loss_cancel() -> None:
    found = []
    for factor in (1.0, 1 / 8, 65536.0):
        student, distiller = pair()
        for number in range(3):
            step(student, distiller, *batch(number), lambda task, own, by=factor: (by * (task + own)).backward())  # type: ignore[misc]
        found.append(distiller.weight)
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_two_backward_passes_are_as_one() -> None:
    weights = []
    for apart in (False, True):
        student, distiller = pair()

        def backward(task: Tensor, own: Tensor, apart: bool = apart) -> None:
            if apart:
                task.backward(retain_graph=True)
                own.backward()
            else:
                (task + own).backward()

        step(student, distiller, *batch(), backward)
        weights.append(distiller.weight)
    assert weights[1] == pytest.approx(weights[0], rel=1e-4)


def test_steps_in_which_there_is_nothing_to_compare_change_nothing() -> None:
    student, distiller = pair()
    step(student, distiller, *batch())
    before = copy.deepcopy(distiller.state_dict())

    def assert_unchanged() -> None:
        for name, value in distiller.state_dict().items():
            assert name == "_extra_state" or torch.equal(value, before[name])

    step(student, distiller, *batch(1), lambda _, own: own.backward())  # no task
    assert_unchanged()
    step(student, distiller, *batch(1), lambda task, own: (task + 0 * own).backward())  # no distillation
    assert_unchanged()
    step(student, distiller, *batch(1), lambda task, _: task.backward())  # not even in the loss
    assert_unchanged()
    step(student, distiller, *batch(1), lambda task, own: (torch.inf * (task + own)).backward())  # an overflow
    assert_unchanged()
    with distiller.tap, torch.no_grad():  # validation
        student(batch(1)[0])
        distiller(batch(1)[1])
    distiller.eval()
    step(student, distiller, *batch(1))
    assert_unchanged()
    with distiller.train().tap:  # a step that fails half-way
        images, targets = batch(1)
        output = student(images)
        output.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            (task_of(output) + distiller(targets)).backward()
    distiller.load_state_dict(before)
    step(student, distiller, *batch(2))
    assert distiller.share is not None
    assert distiller.share.counted == 2, "the next step counts again"


def test_a_scaler_that_skips_a_step_changes_nothing_and_goes_on() -> None:
    student, distiller = pair()
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    scales = []
    for number in range(12):

        def backward(task: Tensor, own: Tensor, factor: float = torch.inf if number in (2, 7) else 1.0) -> None:
            scaler.scale(factor * (task + own)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        with torch.autocast("cpu", dtype=torch.bfloat16):
            step(student, distiller, *batch(), backward)
        scales.append(scaler.get_scale())
    assert min(scales) < max(scales), "the scale went down and up"
    assert distiller.share is not None
    assert distiller.share.counted == 10, "of 12, of which 2 overflowed"
    task, own = norms(student, distiller, *batch())
    assert distiller.weight == pytest.approx(ODDS * task / own, rel=0.05), "in bfloat16"


class Pair(nn.Module):
    """A layer that gives a tuple, of which the student goes on with both, and the distillation with the second."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.body, self.block, self.head = kind, nn.Conv2d(3, 8, 16, 16), Both(kind), nn.Conv2d(8, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        out = self.block(self.body(images))
        if self.kind == "map":
            return torch.as_tensor(self.head(out))
        first, second = (out["first"], out["second"]) if isinstance(out, Mapping) else out
        return torch.as_tensor(self.head(second)) + 0 * first.sum()


class Both(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, map_BChw: Tensor) -> Any:
        first, second = 100 * map_BChw, map_BChw.tanh()
        return {"map": second, "tuple": (first, second), "output": ModelOutput(first=first, second=second)}[self.kind]


@pytest.mark.parametrize(
    ("kind", "select"),
    [("tuple", lambda output: output[1] * 1), ("output", lambda output: output.second * 1), ("tuple", 1)],
)
def test_a_function_of_an_output_that_is_no_tensor_is_measured_too(kind: str, select: Any) -> None:
    weights, states = [], []
    for student, chosen in ((Pair("map"), None), (Pair(kind), select)):
        torch.manual_seed(1)
        recipe = recipes.rtdetrv4(weight=1.0, share=SHARE)
        distiller = recipe.for_student(student, 4, torch.rand(1, 3, 64, 64), layers="block", select=chosen)
        for number in range(3):
            step(student, distiller, *batch(number))
        weights.append(distiller.weight)
        states.append([each.grad for each in [*student.parameters(), *distiller.parameters()]])
        assert distiller.share is not None
        assert distiller.share.counted == 3
        assert copy.deepcopy(distiller).weight == distiller.weight
    assert weights[1] == pytest.approx(weights[0], rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*states, strict=True))


def test_a_share_that_never_counts_says_so_once() -> None:
    student, distiller = pair()
    images, targets = batch()

    def nothing_counts() -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(30):
                step(student, distiller, images, targets, lambda _, own: own.backward())  # no task
        return [str(each.message) for each in seen if "gradient share" in str(each.message)]

    (said,) = nothing_counts()
    assert "none of 20 batches counted" in said
    assert "share=None" in said
    assert not nothing_counts()
    student, distiller = pair()
    step(student, distiller, images, targets)
    assert not nothing_counts(), "one has counted"
    student, distiller = pair()

    def task_first() -> None:
        with distiller.tap:
            for _ in range(21):
                task_of(student(images)).backward(retain_graph=True)
                distiller(targets).backward()

    with pytest.warns(UserWarning, match="in one before, but behind the call of the distiller"):
        task_first()


def test_behind_its_end_the_distillation_is_a_zero_that_looks_at_nothing() -> None:
    student, distiller = pair(schedule=WeightSchedule(until=1))
    images, targets = batch()
    step(student, distiller, images, targets)
    for parameter in [*student.parameters(), *distiller.parameters()]:
        parameter.grad = None
    student[2].requires_grad_(False)
    with distiller.tap:
        student(images)
        loss = distiller(Features(feature_map=torch.full((2, 4, 4, 4), torch.nan)))
    loss.backward()
    assert float(loss) == 0
    for parameter in [*student[:2].parameters(), *distiller.parameters()]:
        assert parameter.grad is not None, "DDP waits for it"
        assert not parameter.grad.any()


def test_a_checkpointed_layer_is_measured_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            tapped: Tensor = checkpoint(self.inner[:2], images, use_reentrant=False)
            out: Tensor = self.inner[2](tapped)
            return out

    plain, first = pair()
    step(plain, first, *batch())
    inner, _ = pair()
    student = Checkpointed(inner)
    torch.manual_seed(0)
    second = recipes.rtdetrv4(weight=1.0, share=SHARE).for_student(
        student, 4, torch.rand(1, 3, 64, 64), layers="inner.1"
    )
    second.terms.load_state_dict(first.terms.state_dict())
    step(student, second, *batch())
    assert second.weight == pytest.approx(first.weight, rel=1e-5)
    assert second.share is not None
    assert second.share.counted == 1


def test_several_layers_are_one_gradient() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    recipe = recipes.rtdetrv4(weight=1.0, share=SHARE)
    distiller = recipe.for_student(student, 4, torch.rand(1, 3, 64, 64), layers=["0", "1"])
    images, targets = batch()
    first = student[0](images).detach().requires_grad_()
    second = student[1](first)
    task = torch.autograd.grad(task_of(student[2](second)), [first, second], retain_graph=True)
    own = torch.autograd.grad(distiller.terms({"0": first, "1": second}, targets), [first, second])
    # What the second layer's loss sends to the first through the second belongs to what the student computes there.
    alone = torch.autograd.grad(distiller.terms.losses[0](first, targets), first)[0]
    through = own[0] - alone
    expected_task = (task[0] + through).square().sum() + task[1].square().sum()
    expected_own = alone.square().sum() + own[1].square().sum()
    step(student, distiller, images, targets)
    assert distiller.share is not None
    assert float(distiller.share.log_ratio) == pytest.approx(float((expected_task / expected_own).log() / 2), rel=1e-3)


def test_a_resumed_training_goes_on_exactly() -> None:
    def run(student: nn.Sequential, distiller: Distiller, steps: range) -> list[float]:
        optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
        weights = []
        for number in steps:
            step(student, distiller, *batch(number))
            optimizer.step()
            optimizer.zero_grad()
            weights.append(distiller.weight)
        return weights

    undisturbed = run(*pair(), range(8))
    student, distiller = pair()
    begun = run(student, distiller, range(4))
    again, resumed = pair(seed=1)
    again.load_state_dict(student.state_dict())
    resumed.load_state_dict(distiller.state_dict())
    assert begun + run(again, resumed, range(4, 8)) == undisturbed


@pytest.mark.slow
def test_all_ranks_have_the_weight_of_the_sum_of_their_gradients(tmp_path: Path) -> None:
    script = SUPPORT / "share_ranks.py"
    file = tmp_path / "ranks"
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, str(script), str(rank), "2", str(file)], env=threads) for rank in range(2)
    ]
    assert [each.wait(240) for each in started] == [0, 0]
    first, second = (torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2))
    assert first["weights"] == second["weights"]
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    fitted = PhiS(4).fit([(1 + rank) * batch_of(0, rank)[1]["feature_map"] for rank in range(2)])
    for name, value in fitted.state_dict().items():
        assert torch.equal(first["phi_s"][name], second["phi_s"][name])
        assert torch.allclose(first["phi_s"][name], value, atol=1e-5)
    # The same in one process: the gradients of both ranks, one behind the other.
    student = Student()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    share = student.distiller.share
    assert share is not None
    mean, weight, weights = 0.0, 1.0, []
    for number in range(STEPS):
        sums = [0.0, 0.0]
        for rank in range(2):
            images, targets, factor = batch_of(number, rank)
            task, own = norms(student.net, student.distiller, images, targets)
            sums = [sums[0] + (factor * task) ** 2, sums[1] + own**2]
        mean += (0.5 * float(torch.tensor(sums[0] / sums[1]).log()) - mean) / (number + 1)
        for rank in range(2):
            images, targets, factor = batch_of(number, rank)
            share.weight.fill_(weight)
            (student(images, targets, factor) / 2).backward()
        weight = min(max(ODDS * float(torch.tensor(mean).exp()), weight / 10), weight * 10)
        optimizer.step()
        optimizer.zero_grad()
        weights.append(weight)
    assert first["weights"] == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize("options", [{"target": 0}, {"target": 1}, {"weight": 0}, {"memory": 0}, {"memory": 1.5}])
def test_what_is_no_share_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        GradientShare(**options)
