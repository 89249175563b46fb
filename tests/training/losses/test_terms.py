"""Several losses in one: of layers, of kinds, with a weight each; projectors; teachers on one scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dinov3_ray import Features
from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.training.losses import (
    DistillationLoss,
    PhiS,
    Term,
    WeightedTerms,
    WeightSchedule,
    cosine_loss,
    make_projector,
    smooth_l1_loss,
)
from dinov3_ray.training.losses.phi_s import hadamard_matrix


def test_the_loss_is_the_weighted_sum_of_the_layers() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = {"model.16": (8, 12), "model.19": (16, 6)}
    outputs = {
        name: torch.randn(2, channels, side, side, generator=draw).requires_grad_()
        for name, (channels, side) in sizes.items()
    }
    targets = Features(feature_map=torch.randn(2, 4, 6, 6, generator=draw))
    losses = {
        name: DistillationLoss("cosine", projector=nn.Conv2d(channels, 4, 1)) for name, (channels, _) in sizes.items()
    }
    summed = WeightedTerms([Term("model.19", losses["model.19"], 2.0), Term("model.16", losses["model.16"], 0.5)])
    expected = 0.5 * losses["model.16"](outputs["model.16"], targets) + 2.0 * losses["model.19"](
        outputs["model.19"], targets
    )
    got = summed(outputs, targets)
    assert torch.allclose(got, expected)
    got.backward()
    assert all(output.grad is not None and output.grad.any() for output in outputs.values())
    assert len(list(summed.parameters())) == 4


def test_kinds_of_one_loss_share_its_projector() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    loss = DistillationLoss({"cosine": 0.9, "smooth_l1": 0.1}, projector=make_projector(5, 3))
    projected = loss.projector(student)  # type: ignore[misc] # there is one
    expected = 0.9 * cosine_loss(projected, teacher) + 0.1 * smooth_l1_loss(projected, teacher)
    assert torch.allclose(loss(student, teacher), expected)
    assert loss.kind == "0.9 cosine + 0.1 smooth_l1"
    with pytest.raises(ConfigError, match="on maps, or on CLS vectors, not both"):
        DistillationLoss({"cosine": 1.0, "cls_mse": 1.0})
    with pytest.raises(ConfigError, match="weight above 0"):
        DistillationLoss({"cosine": 0.0})


def test_terms_of_several_teachers_find_their_targets() -> None:
    terms = WeightedTerms([Term("a", DistillationLoss("cosine"), teacher=name) for name in ("x", "y")])
    output, x, y = (torch.randn(2, 3, 4, 4) for _ in range(3))
    targets = {"x": Features(feature_map=x), "y": Features(feature_map=y)}
    assert torch.allclose(terms({"a": output}, targets), cosine_loss(output, x) + cosine_loss(output, y))
    with pytest.raises(InputError, match="a dict of those of each teacher, 'x' among them"):
        terms({"a": output}, targets["x"])
    with pytest.raises(InputError, match="must be those of 'y', too"):
        terms({"a": output}, {"x": targets["x"]})
    with pytest.raises(InputError, match="of one teacher, and no dict"):
        WeightedTerms([Term("a", DistillationLoss("cosine"))])({"a": output}, targets)


@pytest.mark.parametrize("kind", ["linear", "mlp", "relu"])
@pytest.mark.parametrize("vectors", [True, False])
def test_a_projector_maps_each_location_as_it_maps_a_vector(kind: Any, vectors: bool) -> None:
    projector = make_projector(6, 3, vectors=vectors, kind=kind, hidden=9)
    given = torch.randn(4, 3) if vectors else torch.randn(4, 3, 2, 5)
    projected = projector(given)
    assert projected.shape == (4, 6, *given.shape[2:])
    if not vectors:
        assert torch.allclose(projector(given[:, :, 1:2, 3:4]), projected[:, :, 1:2, 3:4], atol=1e-6)
    lazy = make_projector(6, vectors=vectors, kind=kind, hidden=9)
    assert lazy(given).shape == projected.shape
    lazy.load_state_dict(projector.state_dict())
    assert torch.equal(lazy(given), projected)
    widths = [parameter.shape[0] for parameter in projector.parameters()]
    assert (9 in widths) == (kind != "linear")


@pytest.mark.slow
def test_phi_s_gives_all_channels_mean_0_and_variance_1_and_can_be_undone() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 12, generator=draw) @ torch.randn(12, 12, generator=draw) * 30 + 7
    maps = rows.view(10, 20, 20, 12).permute(0, 3, 1, 2)
    statistics = PhiS(12).fit(maps)
    standardised = statistics(maps)
    of_channels = standardised.permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(of_channels.mean(1), torch.zeros(12), atol=1e-4)
    assert torch.allclose(of_channels.var(1), torch.ones(12), atol=1e-3), "each channel by one scale"
    assert torch.allclose(statistics.inverse(standardised), maps, atol=1e-3)
    # Written from the paper: (H Uᵀ)(x - mean) / φ, φ² the mean of the eigenvalues.
    values, vectors = torch.linalg.eigh(torch.cov(rows.double().T))
    expected = (rows.double() - rows.double().mean(0)) @ (hadamard_matrix(12) @ vectors.T).T / values.mean().sqrt()
    found = statistics(rows)
    # Eigenvectors have no sign: the same up to the signs of U's columns is the same isotropic standardisation.
    assert torch.allclose(found.double() @ found.double().T, expected @ expected.T, atol=1e-2)
    in_two = PhiS(12).fit([rows[:1000], rows[1000:]])
    assert torch.allclose(in_two.scale, statistics.scale)
    again = PhiS(12)
    again.load_state_dict(statistics.state_dict())
    assert torch.equal(again(rows), found)


def test_phi_s_takes_the_statistics_of_the_first_batch_and_keeps_them() -> None:
    first, second = 5 + 3 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    statistics = PhiS(4)
    standardised = statistics(first)
    fitted = PhiS(4).fit(first)
    assert torch.allclose(standardised, fitted(first), atol=1e-5)
    assert torch.allclose(statistics.eval()(second), fitted(second), atol=1e-5)
    again = PhiS(4)
    again(second)
    again.load_state_dict(statistics.state_dict())
    assert torch.equal(again(second), statistics(second))
    again.load_state_dict(PhiS(4).state_dict())
    assert torch.allclose(again(first), standardised), "those that it has lost are taken anew"


def test_phi_s_needs_a_sample_that_differs() -> None:
    with pytest.raises(InputError, match=r"statistics must be there .* in eval mode"):
        PhiS(4).eval()(torch.randn(2, 4))
    with pytest.raises(InputError, match=r"unless distiller\.fit_statistics gets one"):
        PhiS(4)(torch.full((8, 4), 0.1))
    for sample in (torch.ones(9, 4), torch.full((9, 4), torch.nan), torch.randn(9, 3), torch.randn(1, 4), []):
        with pytest.raises(InputError, match="sample must"):
            PhiS(4).fit(sample)
    with pytest.raises(ConfigError, match="a number for which a Hadamard matrix is known"):
        PhiS(6)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 16, 20, 28, 36, 192, 384, 768, 1024, 1152, 1280])
def test_hadamard_matrices_are_orthogonal_and_flat(size: int) -> None:
    matrix = hadamard_matrix(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=matrix.dtype))
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, {0: 1.0, 1e6: 1.0}),
        ({"warmup": 1}, {0: 1.0, 1: 1.0}),
        ({"warmup": 1, "unit": "epoch"}, {0: 1.0, 1: 1.0}),
        ({"warmup": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 1.0}),
        ({"warmup": 2.5, "unit": "epoch"}, {0: 0.4, 1: 0.8, 2: 1.0, 3: 1.0}),
        ({"warmup": 5, "until": 5}, {0: 0.2, 4: 1.0, 5: 0.0}),
        ({"until": 3}, {0: 1.0, 2.9: 1.0, 3: 0.0, 4: 0.0}),
        ({"decay_from": 2, "until": 6, "floor": 0.5}, {2: 1.0, 4: 0.75, 5.999999: 0.5, 6: 0.0}),
    ],
)
def test_a_schedule_is_a_factor_of_what_was_done(options: dict[str, Any], factors: dict[float, float]) -> None:
    schedule = WeightSchedule(**options)
    assert {done: schedule.factor(done) for done in factors} == pytest.approx(factors, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"unit": "day"},
        {"warmup": -1},
        {"warmup": "3"},
        {"warmup": True},
        {"floor": 2},
        {"floor": 0.5},
        {"floor": 0.5, "until": 3},
        {"until": 0},
        {"until": "3"},
        {"until": 5, "warmup": 10},
        {"decay_from": 2},
        {"decay_from": "2", "until": 3},
        {"decay_from": 4, "until": 3},
    ],
)
def test_schedules_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        WeightSchedule(**options)
