"""The layers that a student is compared at: how users name them."""

from __future__ import annotations

from typing import Any

import pytest

from dinov3_ray.errors import ConfigError
from dinov3_ray.integrations.levels import level_weights, named_levels

INPUTS = {8.0: "model.16", 16.0: "model.19", 32.0: "model.22"}


@pytest.mark.parametrize(
    ("levels", "weights"),
    [
        ("P4", {"P4": 1.0}),
        (16, {"model.16": 1.0}),
        ("16", {"model.16": 1.0}),
        ("model.2.cv1", {"model.2.cv1": 1.0}),
        ("P3:0.5, P4 ,P5:2", {"P3": 0.5, "P4": 1.0, "P5": 2.0}),
        (["P3", 19], {"P3": 1.0, "model.19": 1.0}),
        (("P3",), {"P3": 1.0}),
        ({"P3": 0.5, 22: 2}, {"P3": 0.5, "model.22": 2.0}),
    ],
)
def test_levels_are_named_in_any_of_these_forms(levels: Any, weights: dict[str, float]) -> None:
    assert level_weights(levels) == weights
    assert list(level_weights(levels)) == list(weights)
    assert level_weights(level_weights(levels)) == weights


@pytest.mark.parametrize(
    "levels", ["", "P3,,P4", "P3,P3", [], {}, [16, "model.16"], "P3:0", "P3:much", {"P3": -1}, {"P3": None}, True, 1.5]
)
def test_levels_that_cannot_be_meant_are_refused(levels: Any) -> None:
    with pytest.raises(ConfigError, match="distill_layer"):
        level_weights(levels)


def test_p3_to_p5_are_the_inputs_of_the_head() -> None:
    assert named_levels(None, INPUTS, 16) == {"model.19": 1.0}
    assert named_levels({"P3": 0.5, "P5": 2.0}, INPUTS, 16) == {"model.16": 0.5, "model.22": 2.0}
    assert named_levels({"model.4": 1.0}, INPUTS, 16) == {"model.4": 1.0}
    assert named_levels({"model.4": 1.0}, {}, 16) == {"model.4": 1.0}


@pytest.mark.parametrize("weights", [{"P6": 1.0}, {"P4": 1.0, "model.19": 1.0}])
def test_levels_that_the_model_does_not_have_are_refused_with_those_that_it_has(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"P3 \(model\.16\), P4 \(model\.19\), P5 \(model\.22\)"):
        named_levels(weights, INPUTS, 16)


def test_a_model_without_strides_must_be_told_its_layer() -> None:
    with pytest.raises(ConfigError, match="distill_layer must be given"):
        named_levels(None, {}, 16)
