"""The knobs of a pool: each is checked once, and its error names it, the rule and the value."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov3_ray.errors import ConfigError
from dinov3_ray.pool.spec import Placement, PoolOptions, parse_replicas
from dinov3_ray.pool.teacher_pool import resolve_placement
from dinov3_ray.validation import check

WHOLE = ("max_batch", "max_queued", "max_queued_bytes", "window", "threads")
SECONDS = tuple(name for name in PoolOptions.model_fields if name.endswith(("_interval", "_timeout", "_seconds")))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", math.inf])
def test_counts_must_be_whole_and_positive(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolOptions.of({name: value})
    assert str(caught.value) == f"{name} must be a whole number, at least 1; got {value!r}"


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", [0, -0.5, math.nan, math.inf, False, "soon", None])
def test_times_must_be_positive_and_finite(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        PoolOptions.of({name: value})
    assert str(caught.value) == f"{name} must be more than 0 seconds, and finite; got {value!r}"


@pytest.mark.parametrize("value", [-0.001, math.nan, math.inf, True, "soon"])
def test_the_wait_for_company_may_be_nothing_but_not_less(value: object) -> None:
    assert PoolOptions(max_wait=0).max_wait == 0
    with pytest.raises(ConfigError, match=r"max_wait must be at least 0 seconds, and finite; got"):
        PoolOptions.of({"max_wait": value})


def test_batching_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match="batching must be one of exact, dynamic, deterministic; got 'fast'"):
        PoolOptions.of({"batching": "fast"})


def test_an_unknown_option_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"'max_bach' is not an option of a pool; did you mean 'max_batch'\?"):
        PoolOptions.of({"max_bach": 4})
    with pytest.raises(ConfigError, match=r"'xyz' is not an option of a pool \(options: max_batch, batching, .*\)"):
        PoolOptions.of({"xyz": 4})


def test_all_wrong_options_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        PoolOptions.of({"max_bach": 4, "window": "3", "hang_timeout": 0})
    assert str(caught.value) == (
        "3 problems:\n"
        "  - window must be a whole number, at least 1; got '3'\n"
        "  - hang_timeout must be more than 0 seconds, and finite; got 0\n"
        "  - 'max_bach' is not an option of a pool; did you mean 'max_batch'?"
    )


def test_every_option_is_explained() -> None:
    assert {*WHOLE, *SECONDS, "batching", "max_wait"} == set(PoolOptions.model_fields)
    assert all(field.description for field in PoolOptions.model_fields.values())


@given(low=st.integers(1, 100), more=st.integers(0, 100))
def test_replicas_as_a_number_as_a_range_or_left_to_the_pool(low: int, more: int) -> None:
    assert parse_replicas(low, auto=7) == (low, low)
    assert parse_replicas("auto", auto=low) == (low, low)
    assert parse_replicas((low, low + more), auto=7) == parse_replicas([low, low + more], auto=7) == (low, low + more)


@pytest.mark.parametrize(
    "replicas", [0, -1, 1.5, True, None, "many", (0, 2), (1, 2, 3), (), (1.0, 2), (True, 2), (1, True)]
)
def test_replicas_that_make_no_sense_are_refused(replicas: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_replicas(replicas, auto=1)
    rule = 'replicas must be a whole number >= 1, "auto", or (min, max) with min >= 1'
    assert str(caught.value) == f"{rule}; got {replicas!r}"


def test_a_range_upside_down_is_refused_by_both_bounds() -> None:
    with pytest.raises(ConfigError, match=r"replicas=\(min, max\): max \(3\) must be >= min \(5\)"):
        parse_replicas((5, 3), auto=1)


@pytest.mark.parametrize(
    ("num_cpus", "labels", "names"),
    [
        (0, {"zone": "!in("}, "label_selector"),
        (0, {"a zone": "x"}, "a zone"),
        (math.inf, {}, "num_cpus=inf"),
        (0.00001, {}, "num_cpus"),
    ],
)
def test_what_ray_would_refuse_of_a_replica_is_refused_before_there_is_a_pool(
    num_cpus: float, labels: dict[str, str], names: str
) -> None:
    with pytest.raises(ConfigError, match=r"what a replica asks for must be what Ray takes; got num_gpus=0") as caught:
        resolve_placement(Placement(num_gpus=0, num_cpus=num_cpus, label_selector=labels))
    assert names in str(caught.value)
    placement = Placement(num_gpus=0.5, num_cpus=2, label_selector={"zone": "in(a, b)"})
    assert resolve_placement(placement).actor_options() == {
        "num_gpus": 0.5,
        "num_cpus": 2,
        "label_selector": {"zone": "in(a, b)"},
    }


def test_all_problems_of_a_placement_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check(Placement, {"num_gpus": 2, "num_cpus": True, "label_selector": {"zone": 3}})
    assert str(caught.value) == (
        "3 problems:\n"
        "  - num_gpus must be a number from 0 to 1, since a replica computes on one GPU at most (for more GPUs, more "
        "replicas); got 2\n"
        "  - num_cpus must be a number >= 0; got True\n"
        "  - label_selector.zone must be text; got 3"
    )
