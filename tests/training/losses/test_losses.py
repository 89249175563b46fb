"""Each loss against loops over its formula, its gradients against finite differences, and what alignment promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.features import Features
from dinov3_ray.training.boxes import Boxes
from dinov3_ray.training.losses import (
    DistillationLoss,
    cosine_loss,
    gram_loss,
    make_projector,
    mse_loss,
    smooth_l1_loss,
)

EPS = 1e-3


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Finite differences are thousands of tiny operations, which threads on busy cores make several times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def maps(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def length(vector: np.ndarray) -> float:
    return max(math.sqrt(sum(float(x) ** 2 for x in vector)), EPS)


def cosine_of(s: np.ndarray, t: np.ndarray) -> float:
    return 1 - sum(float(a) * float(b) for a, b in zip(s, t, strict=True)) / (length(s) * length(t))


def mse_of(s: np.ndarray, t: np.ndarray) -> float:
    return sum((float(a) - float(b)) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


def smooth_l1_of(s: np.ndarray, t: np.ndarray, beta: float = 0.7) -> float:
    total = 0.0
    for a, b in zip(s, t, strict=True):
        d = abs(float(a) - float(b))
        total += 0.5 * d * d / beta if d < beta else d - 0.5 * beta
    return total / len(s)


def by_loop(one: Callable[[np.ndarray, np.ndarray], float], student: Tensor, teacher: Tensor, weight: Tensor) -> float:
    above = below = 0.0
    s, t, batch, (h, w) = student.numpy(), teacher.numpy(), len(student), student.shape[2:]
    for b in range(batch):
        for i in range(h):
            for j in range(w):
                above += float(weight[b, i, j]) * one(s[b, :, i, j], t[b, :, i, j])
                below += float(weight[b, i, j])
    return above / below


def gram_by_loop(student: Tensor, teacher: Tensor, weight: Tensor, per_image: bool) -> float:
    batch, (h, w) = len(student), student.shape[2:]
    places = [(b, i, j) for b in range(batch) for i in range(h) for j in range(w)]
    above = below = 0.0
    for p in places:
        for q in places:
            if per_image and p[0] != q[0]:
                continue
            similar = []
            for each in (student.numpy(), teacher.numpy()):
                a, b = each[p[0], :, p[1], p[2]], each[q[0], :, q[1], q[2]]
                similar.append(float(a @ b) / (length(a) * length(b)))
            pair = float(weight[p]) * float(weight[q])
            above += pair * (similar[0] - similar[1]) ** 2
            below += pair
    return above / below


LOSSES: list[tuple[str, Callable[..., Tensor], Callable[[np.ndarray, np.ndarray], float]]] = [
    ("cosine", cosine_loss, cosine_of),
    ("mse", mse_loss, mse_of),
    ("smooth_l1", lambda s, t, w=None: smooth_l1_loss(s, t, w, beta=0.7), smooth_l1_of),
]


@pytest.mark.parametrize(("name", "loss", "one"), LOSSES, ids=[name for name, *_ in LOSSES])
def test_map_losses_match_a_loop(name: str, loss: Callable[..., Tensor], one: Callable[..., float]) -> None:
    student, teacher, weight = maps(2, 5, 3, 4), maps(2, 5, 3, 4, seed=1), maps(2, 3, 4, seed=2).abs()
    student[0, :, 1, 1] = 0  # as a ReLU leaves them
    assert loss(student, teacher, weight).item() == pytest.approx(by_loop(one, student, teacher, weight), rel=1e-12)
    plain = by_loop(one, student, teacher, torch.ones(2, 3, 4))
    assert loss(student, teacher).item() == pytest.approx(plain, rel=1e-12)
    assert loss(student, teacher, torch.full((2, 3, 4), 0.3)).item() == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("per_image", [True, False])
def test_gram_matches_a_loop(per_image: bool) -> None:
    student, teacher, weight = maps(2, 3, 2, 3), maps(2, 5, 2, 3, seed=1), maps(2, 2, 3, seed=2).abs()
    ones = torch.ones(2, 2, 3)
    assert gram_loss(student, teacher, weight, per_image=per_image).item() == pytest.approx(
        gram_by_loop(student, teacher, weight, per_image), rel=1e-12
    )
    assert gram_loss(student, teacher, per_image=per_image).item() == pytest.approx(
        gram_by_loop(student, teacher, ones, per_image), rel=1e-12
    )


def test_cls_losses_match_a_loop() -> None:
    student, teacher = maps(4, 6), maps(4, 6, seed=1)
    pairs = list(zip(student.numpy(), teacher.numpy(), strict=True))
    for kind, one in (("cls_cosine", cosine_of), ("cls_mse", mse_of)):
        expected = sum(one(s, t) for s, t in pairs) / 4
        assert DistillationLoss(kind)(student, Features(cls=teacher)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("align", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1", "gram"])
def test_gradients_of_the_whole_path(kind: str, align: str) -> None:
    teacher, box = maps(2, 4, 3, 2, seed=1), torch.tensor([[0.1, 0.1, 0.6, 0.8]])
    boxes = Boxes.of(box, torch.tensor([1]), format="xyxy")
    distill = DistillationLoss(kind, projector=make_projector(4, 3).double(), align=align, background_weight=0.2)
    student = maps(2, 3, 2, 4).requires_grad_()
    parameters = list(distill.parameters())

    def call(student: Tensor, *_: Tensor) -> Tensor:  # the parameters are named so that they are checked as well
        return distill(student, teacher, boxes)

    assert torch.autograd.gradcheck(call, (student, *parameters))


@pytest.mark.parametrize("kind", ["cls_cosine", "cls_mse"])
def test_gradients_of_cls(kind: str) -> None:
    distill, teacher = DistillationLoss(kind), maps(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda student: distill(student, teacher), maps(3, 4).requires_grad_())


def test_boxes_weigh_objects_and_background() -> None:
    student, teacher = maps(3, 4, 4, 4), maps(3, 4, 4, 4, seed=1)
    boxes = Boxes.of(torch.tensor([[0.25, 0.25, 0.75, 0.75]]), torch.tensor([1]), format="xyxy")
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[1, 1:3, 1:3] = True
    for objects, background in ((1.0, 0.0), (1.0, 0.1), (0.0, 2.0)):
        distill = DistillationLoss(object_weight=objects, background_weight=background)
        weight = torch.where(mask, objects, background)
        assert distill(student, teacher, boxes).item() == pytest.approx(
            by_loop(cosine_of, student, teacher, weight), rel=1e-6
        )
        assert torch.equal(distill(student, teacher, mask), distill(student, teacher, boxes))
    # Objects alone: what is outside of them has no say.
    only = DistillationLoss(background_weight=0.0)
    elsewhere = torch.where(mask[:, None], student, student + 9)
    assert torch.equal(only(student, teacher, boxes), only(elsewhere, teacher, boxes))


def test_a_batch_without_objects_costs_nothing_and_still_has_gradients() -> None:
    student = maps(2, 4, 3, 3).float().requires_grad_()
    distill = DistillationLoss(background_weight=0.0, projector=6)
    loss = distill(student, maps(2, 6, 3, 3, seed=1), Boxes.of([torch.zeros(0), torch.zeros(0)], format="xyxy"))
    loss.backward()
    assert loss.item() == 0
    for tensor in (student, *distill.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("kind", ["cosine", "gram"])
def test_vectors_of_length_zero_keep_gradients_bounded(kind: str) -> None:
    student = torch.zeros(1, 4, 2, 2).requires_grad_()
    DistillationLoss(kind)(student, maps(1, 4, 2, 2, scale=20.0)).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() <= 4 / EPS


def test_grids_are_aligned_either_way() -> None:
    coarse, fine = maps(2, 4, 2, 3), maps(2, 4, 4, 6, seed=1)
    pooled = fine.view(2, 4, 2, 2, 3, 2).mean((3, 5))
    for student, teacher, align in ((coarse, fine, "student"), (fine, coarse, "teacher")):
        expected = mse_loss(*((coarse, pooled) if align == "student" else (pooled, coarse)))
        loss = DistillationLoss("mse", align=align)(student, Features(feature_map=teacher))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_half_precision_targets_are_widened_before_they_are_averaged() -> None:
    # 256 + 1 is 256 in bfloat16: a mean of [256, 258] rounded there is not 257.
    teacher = torch.tensor([256.0, 258.0]).bfloat16().view(1, 1, 1, 2)
    loss = DistillationLoss("mse")(torch.zeros(1, 1, 1, 1), teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == 257.0**2


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1", "gram"])
def test_autocast_and_half_students_compute_in_float32(kind: str) -> None:
    student, teacher = maps(2, 8, 4, 4).bfloat16(), maps(2, 8, 4, 4, seed=1, scale=30.0).bfloat16()
    distill = DistillationLoss(kind)
    expected = distill(student.double(), teacher.double())
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distill(leaf, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


def test_only_the_student_learns() -> None:
    teacher = maps(2, 4, 3, 3).requires_grad_()
    student = maps(2, 4, 3, 3, seed=1).requires_grad_()
    for kind in ("cosine", "mse", "smooth_l1", "gram"):
        DistillationLoss(kind)(student, Features(feature_map=teacher)).backward()
    cosine_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_layers_of_the_teacher() -> None:
    student, other = maps(1, 4, 2, 2), maps(1, 4, 2, 2, seed=1)
    features = Features(feature_map=student, layers={4: other})
    assert DistillationLoss("mse")(student, features).item() == 0
    assert torch.equal(DistillationLoss("mse", layer=4)(student, features), mse_loss(student, other))


def test_a_lazy_projector_is_sized_trained_saved_and_loaded() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    distill = DistillationLoss("cosine", projector=5)
    optimizer = torch.optim.SGD(distill.parameters(), lr=0.5)  # before its size is known
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = distill(student, teacher)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert {name: tuple(value.shape) for name, value in distill.state_dict().items()} == {
        "projector.weight": (5, 3, 1, 1),
        "projector.bias": (5,),
    }
    again = DistillationLoss("cosine", projector=5)
    again.load_state_dict(distill.state_dict())  # into one that has seen nothing
    assert torch.equal(again(student, teacher), distill(student, teacher))
    vectors = DistillationLoss("cls_mse", projector=5)
    assert vectors(torch.randn(2, 3), torch.randn(2, 5)).ndim == 0
    assert make_projector(5, 3, vectors=True)(torch.randn(2, 3)).shape == (2, 5)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("kind must be one of", {"kind": "kl"}),
        ("align must be", {"align": "both"}),
        ("object_weight and background_weight", {"object_weight": 0.0, "background_weight": 0.0}),
        ("object_weight and background_weight", {"background_weight": -1.0}),
        ("beta must be more than 0", {"kind": "smooth_l1", "beta": 0.0}),
        ("layer must be None", {"kind": "cls_mse", "layer": 3}),
        ("teacher_channels must be", {"projector": 0}),
        ("projector must be", {"projector": "linear"}),
    ],
)
def test_wrong_options(match: str, options: dict) -> None:
    with pytest.raises(ConfigError, match=match):
        DistillationLoss(**options)


def test_wrong_tensors() -> None:
    student, teacher = maps(2, 4, 3, 3), maps(2, 6, 3, 3)
    distill = DistillationLoss()
    with pytest.raises(InputError, match=r"same channels; got 4 and 6 \(pass projector=6"):
        distill(student, teacher)
    with pytest.raises(InputError, match="same images; got 2 and 1"):
        distill(student, teacher[:1])
    with pytest.raises(InputError, match=r"student must be a floating-point tensor \[B, D, h, w\]"):
        distill(student.flatten(2), teacher)
    with pytest.raises(InputError, match=r"ask for FeatureSpec\(feature_map=True\)"):
        distill(student, Features(cls=teacher[:, :, 0, 0]))
    with pytest.raises(InputError, match=r"FeatureSpec\(layers=\(7,\)\)"):
        DistillationLoss(layer=7)(student, Features(feature_map=teacher))
    with pytest.raises(InputError, match=r"a mask must be \[B, h, w\] = \[2, 3, 3\]"):
        distill(student, student, torch.ones(2, 3, 4))
    with pytest.raises(InputError, match="a CLS vector has no locations"):
        DistillationLoss("cls_mse")(maps(2, 4), maps(2, 4), torch.ones(2, 1, 1))
    with pytest.raises(InputError, match="one device"):
        distill(student, student.to("meta"))
    with pytest.raises(InputError, match="the same shape"):
        mse_loss(student, teacher)
    with pytest.raises(InputError, match="the same images and grid"):
        gram_loss(student, teacher[:, :, :2])
    with pytest.raises(InputError, match="weights must be"):
        cosine_loss(student, student, torch.ones(2, 1, 3))


def test_nothing_waits_for_the_device() -> None:
    # Meta tensors have no values: whatever asked for one (and would make a training loop wait) fails here.
    # (Gram, which takes no decision either, turns autocast off, and meta has none.)
    student = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True)
    rows, index = torch.empty(5, 5, device="meta"), torch.empty(5, device="meta")
    boxes = Boxes.of(rows, index, format="xywhr", image_size=(64, 64))
    for kind in ("cosine", "mse", "smooth_l1"):
        teacher = torch.empty(2, 6, 8, 8, device="meta", dtype=torch.bfloat16)
        distill = DistillationLoss(kind, projector=make_projector(6, 3).to("meta"), background_weight=0.1)
        distill(student, teacher, boxes).backward()
        assert student.grad is not None
