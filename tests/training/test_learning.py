"""A student that learns nothing: said once with the remedy, and not said of one that learns, or is validated."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov3_ray.features import FeatureSpec
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training.boxes import Boxes
from dinov3_ray.training.losses import DistillationLoss
from dinov3_ray.training.taps import FeatureTap

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = FakeTeacher(hidden_size=16).extract(IMAGES, FeatureSpec(feature_map=True))
NO_BOXES = Boxes.of([torch.zeros(0, 4)] * 2, format="xyxy")
A_BOX = Boxes.of([torch.tensor([[0.1, 0.1, 0.9, 0.9]]), torch.zeros(0, 4)], format="xyxy")


class Student(nn.Module):
    """``run`` says how the backbone is called."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.ReLU(), nn.Conv2d(16, 16, 2, stride=2))
        self.head = nn.Conv2d(16, 4, 1)
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        predictions: Tensor = self.head(self.run(self.backbone, images))
        return predictions


def frozen() -> Student:
    student = Student()
    student.backbone.requires_grad_(False)
    return student


def partly_frozen() -> Student:
    student = Student()
    student.backbone[2].requires_grad_(False)
    return student


def without_gradients(backbone: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return backbone(images)  # type: ignore[no-any-return]


def checkpointed(*, use_reentrant: bool, whole: bool = True) -> Callable[[], Student]:
    """``whole``: the tapped layer does not give what the checkpoint gives."""

    def run(backbone: nn.Module, images: Tensor) -> Tensor:
        def inside(x: Tensor) -> Tensor:
            features: Tensor = backbone(x)
            return features * 2 if whole else features

        result: Tensor = checkpoint(inside, images.clone().requires_grad_(), use_reentrant=use_reentrant)
        return result

    return lambda: Student(run)


@pytest.fixture
def said() -> Iterator[list[warnings.WarningMessage]]:
    """What is warned of, each time that it is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def texts(said: list[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in said if str(each.message).startswith(("the ", "no box"))]


def train(
    student: Student, loss: DistillationLoss, steps: int = 3, *, forgotten: bool = False, boxes: Boxes | None = None
) -> None:
    parameters = [*student.parameters(), *(() if forgotten else loss.parameters())]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    with FeatureTap(student, "backbone.2") as tap:
        for _ in range(steps):
            predictions = student(IMAGES)
            total = predictions.square().mean() + loss(tap.take(), TARGETS, boxes)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()


NOTHING = {
    "frozen": frozen,
    "no_grad": lambda: Student(without_gradients),
    "reentrant": checkpointed(use_reentrant=True),
}
SOMETHING = {
    "plain": Student,
    "a frozen layer": partly_frozen,
    "not reentrant": checkpointed(use_reentrant=False),
    "at the end of a reentrant": checkpointed(use_reentrant=True, whole=False),
}


@pytest.mark.parametrize("projector", [None, 16])
@pytest.mark.parametrize("make", NOTHING.values(), ids=NOTHING)
def test_a_tapped_layer_without_a_gradient_is_said_once(
    said: list[warnings.WarningMessage], make: Callable[[], Student], projector: int | None
) -> None:
    train(make(), DistillationLoss(projector=projector))
    (text,) = texts(said)
    assert text.startswith("the output of layer 'backbone.2' takes no gradient")
    assert "use_reentrant=False" in text


@pytest.mark.parametrize("make", NOTHING.values(), ids=NOTHING)
def test_a_loss_says_it_where_there_is_no_tap(said: list[warnings.WarningMessage], make: Callable[[], Student]) -> None:
    student, loss = make(), DistillationLoss()
    for _ in range(3):
        found: list[Tensor] = []
        hook = student.backbone[2].register_forward_hook(lambda *args, to=found: to.append(args[2]))
        student(IMAGES)
        hook.remove()
        loss(found[0], TARGETS)
    (text,) = texts(said)
    assert text.startswith("the student's tensor takes no gradient")


@pytest.mark.slow
@pytest.mark.parametrize("make", SOMETHING.values(), ids=SOMETHING)
def test_a_student_that_learns_is_left_in_peace(
    said: list[warnings.WarningMessage], make: Callable[[], Student]
) -> None:
    student = make()
    before = copy.deepcopy(student.backbone[0].weight)
    train(student, DistillationLoss(projector=16), steps=130)
    assert not torch.equal(student.backbone[0].weight, before)
    assert not texts(said)


@pytest.mark.slow
@pytest.mark.parametrize("make", [*NOTHING.values(), *SOMETHING.values()], ids=[*NOTHING, *SOMETHING])
def test_validation_is_left_in_peace(said: list[warnings.WarningMessage], make: Callable[[], Student]) -> None:
    student, loss = make(), DistillationLoss(projector=16, background_weight=0)
    with FeatureTap(student, "backbone.2") as tap:
        for _ in range(130):
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():  # in train mode, as detectors that give losses in no other
                    student(IMAGES)
                    loss(tap.take(), TARGETS, NO_BOXES)
        student.eval()
        loss.eval()
        for _ in range(130):
            student(IMAGES)
            loss(tap.take(), TARGETS, NO_BOXES)
    assert not texts(said)


def test_swapped_arguments_are_told_from_a_frozen_student(said: list[warnings.WarningMessage]) -> None:
    map_BDhw = TARGETS.feature_map
    assert map_BDhw is not None
    DistillationLoss()(map_BDhw, Student().backbone(IMAGES))
    (text,) = texts(said)
    assert "as if they were swapped (the student comes first)" in text


def test_a_projector_that_cuts_the_gradient_is_said(said: list[warnings.WarningMessage]) -> None:
    class Cutting(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    loss = DistillationLoss(projector=Cutting(16, 16, 1))
    for _ in range(2):
        loss(Student().backbone(IMAGES), TARGETS)
    (text,) = texts(said)
    assert text.startswith("the projector's output takes no gradient, while its input does")


@pytest.mark.slow
@pytest.mark.parametrize("projector", [16, nn.Conv2d(16, 16, 1)], ids=["lazy", "own"])
def test_a_projector_that_nobody_trains_is_said_once(
    said: list[warnings.WarningMessage], projector: int | nn.Module
) -> None:
    train(Student(), DistillationLoss(projector=copy.deepcopy(projector)), steps=250)
    assert not texts(said)
    loss = DistillationLoss(projector=copy.deepcopy(projector))
    train(Student(), loss, steps=95, forgotten=True)
    assert not texts(said)
    train(Student(), pickle.loads(pickle.dumps(loss)), steps=250, forgotten=True)
    (text,) = texts(said)
    assert text.startswith(
        "the projector's weights have not changed in 100 training batches: give distill.parameters()"
    )


def test_an_optimizer_that_writes_past_torchs_counter_is_seen(said: list[warnings.WarningMessage]) -> None:
    student, loss = Student(), DistillationLoss(projector=16)
    for _ in range(250):
        loss(student.backbone(IMAGES), TARGETS).backward()
        for parameter in loss.parameters():
            parameter.data.sub_(0.01 * parameter.grad)  # type: ignore[operator]
    assert not texts(said)


def test_a_frozen_projector_is_a_choice(said: list[warnings.WarningMessage]) -> None:
    loss = DistillationLoss(projector=nn.Conv2d(16, 16, 1).requires_grad_(False))
    train(Student(), loss, steps=130, forgotten=True)
    assert not texts(said)


@pytest.mark.slow
def test_boxes_that_never_come_are_said_where_only_they_count(said: list[warnings.WarningMessage]) -> None:
    for boxes, background, expected in ((A_BOX, 0, 0), (NO_BOXES, 0.1, 0), (None, 0, 0), (NO_BOXES, 0, 1)):
        said.clear()
        train(Student(), DistillationLoss(background_weight=background), steps=120, boxes=boxes)
        assert len(texts(said)) == expected
    said.clear()
    loss = DistillationLoss(background_weight=0)
    features = Student().backbone(IMAGES)
    for index in range(250):
        loss(features, TARGETS, NO_BOXES if index % 99 else A_BOX)
    assert not texts(said)


def test_compiled_code_is_not_broken_by_the_look() -> None:
    torch.compiler.reset()
    loss = DistillationLoss(projector=nn.Conv2d(16, 16, 1))
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    student = Student()
    for _ in range(3):
        compiled(student.backbone(IMAGES), TARGETS.feature_map)
