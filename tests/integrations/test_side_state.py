"""Parameters that an optimizer trains, and its checkpoints do not have: a group of their own, or the last of one."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from dinov3_ray.integrations.side_state import SideState

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"class": SGD, "momentum": 0.9, "nesterov": True},
    "adamw": {"class": AdamW, "betas": (0.8, 0.9)},
}


def parts(name: str) -> tuple[nn.Module, nn.Module, Optimizer]:
    """A model, a projector, and an optimizer of the model in the groups that Ultralytics makes."""
    torch.manual_seed(0)
    model, projector = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)
    given = dict(OPTIMIZERS[name])
    kind = given.pop("class")
    common = {"lr": 0.1, **given}
    return (
        model,
        projector,
        kind(
            [
                {"params": [model[0].weight], **common, "weight_decay": 0.5, "param_group": "weight"},
                {"params": list(model[1].parameters()), **common, "weight_decay": 0.0, "param_group": "bn"},
            ]
        ),
    )


def aside(optimizer: Optimizer, projector: nn.Module, own_group: bool) -> SideState:
    parameters = list(projector.parameters())
    if own_group:
        return SideState.in_own_group(optimizer, parameters, "side")
    optimizer.param_groups[-1]["params"].extend(parameters)
    return SideState(optimizer, parameters)


def step(model: nn.Module, projector: nn.Module, optimizer: Optimizer) -> None:
    inputs = torch.arange(15.0).view(5, 3).sin()
    optimizer.zero_grad()
    projector(model(inputs)).square().sum().backward()
    optimizer.step()


def same_tree(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tree(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_tree, one, other))
    return bool(one == other)


@pytest.mark.parametrize("own_group", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_that_of_an_optimizer_without_them(name: str, own_group: bool) -> None:
    model, projector, optimizer = parts(name)
    aside(optimizer, projector, own_group)
    before = projector.weight.detach().clone()
    step(model, projector, optimizer)
    assert not torch.equal(projector.weight, before)
    plain_model, _, plain = parts(name)
    for own, other in zip(model.parameters(), plain_model.parameters(), strict=True):
        other.grad = None if own.grad is None else own.grad.clone()
    plain.step()
    assert same_tree(optimizer.state_dict(), plain.state_dict())
    assert (optimizer.param_groups[-1]["param_group"] == "side") == own_group
    assert optimizer.param_groups[-1]["lr"] == 0.1
    assert all(optimizer.param_groups[-1][key] == value for key, value in OPTIMIZERS[name].items() if key != "class")


@pytest.mark.parametrize("own_group", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_where_it_was(name: str, own_group: bool) -> None:
    model, projector, optimizer = parts(name)
    group = aside(optimizer, projector, own_group)
    step(model, projector, optimizer)
    saved = {
        "model": {key: value.clone() for key, value in model.state_dict().items()},
        "projector": {key: value.clone() for key, value in projector.state_dict().items()},
    }
    plain, kept = torch.load(_stored(optimizer.state_dict())), torch.load(_stored(group.state()))
    step(model, projector, optimizer)

    again_model, again_projector, again = parts(name)
    resumed = aside(again, again_projector, own_group)
    again_model.load_state_dict(saved["model"])
    again_projector.load_state_dict(saved["projector"])
    again.load_state_dict(plain)
    assert not any(resumed.state())
    resumed.load(kept)
    assert same_tree(resumed.state(), kept)
    step(again_model, again_projector, again)
    assert same_tree(again_model.state_dict(), model.state_dict())
    assert same_tree(again_projector.state_dict(), projector.state_dict())


@pytest.mark.parametrize("own_group", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loading_a_plain_state_leaves_theirs_as_it_is(name: str, own_group: bool) -> None:
    model, projector, optimizer = parts(name)
    group = aside(optimizer, projector, own_group)
    step(model, projector, optimizer)
    before = torch.load(_stored(group.state()))
    assert all(before)
    _, _, plain = parts(name)
    optimizer.load_state_dict(plain.state_dict())
    assert same_tree(group.state(), before)
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer.param_groups) == 2 + own_group


def test_a_group_that_has_no_others_stays() -> None:
    model, projector, _ = parts("adamw")
    groups = [{"params": list(model.parameters())}, {"params": []}]
    optimizer = AdamW([dict(group) for group in groups])
    aside(optimizer, projector, own_group=False)
    step(model, projector, optimizer)
    plain = AdamW([dict(group) for group in groups])
    plain.load_state_dict(optimizer.state_dict())
    assert same_tree(plain.state_dict(), optimizer.state_dict())


def _stored(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer
