"""Somebody else calls ray.shutdown(): whatever is asked next says so, at once, and no second Ray is started."""

from __future__ import annotations

import os

import pytest
from script_process import own_ray, run_script

from dinov3_ray import TeacherPool
from dinov3_ray.testing import FakeTeacher


@pytest.fixture(scope="module")
def outcomes(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What tests/support/left_ray.py saw: in a Ray of its own, and in one that goes on."""
    images = tmp_path_factory.mktemp("images")
    joined = {**os.environ, "RAY_ADDRESS": ray_cluster, "RAY_AUTH_MODE": "token"}
    found = {}
    with own_ray() as own, TeacherPool.start(FakeTeacher.factory(), name="elsewhere", replicas=1, threads=1):
        for case, environment in (("own", own), ("joined", joined)):
            found[case], said = run_script("left_ray.py", images, env=environment)
            assert "Traceback" not in said
    return found


ENTRANCES = ["in flight", "extract", "submit", "info", "prefetch", "teacher", "status", "scale", "reload"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["own", "joined"])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_says_that_ray_was_left(outcomes: dict[str, dict[str, str]], case: str, entrance: str) -> None:
    assert outcomes[case][entrance].startswith("PoolClosedError: this process has left the pool's Ray at ")
    assert "ray.shutdown() was called here" in outcomes[case][entrance]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["own", "joined"])
def test_ends_are_quiet_and_nothing_starts_a_second_ray(outcomes: dict[str, dict[str, str]], case: str) -> None:
    seen = outcomes[case]
    assert seen["a result that was there"] == "equal"
    assert [seen[end] for end in ("close", "exit of a context", "shutdown", "repr")] == ["nothing"] * 4
    assert seen["second shutdown"] == "nothing"
    assert seen["Ray after each"] == "never"
    assert float(seen["seconds in flight"]) < 8, "it did not wait for attempt_timeout"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["own", "joined"])
def test_a_connection_that_somebody_made_since_is_not_the_pools(outcomes: dict[str, dict[str, str]], case: str) -> None:
    for entrance in ("extract in another Ray", "status in another Ray"):
        assert outcomes[case][entrance].startswith("PoolClosedError: this process has left the pool's Ray at ")
    assert outcomes[case]["the other Ray"] == "is there"


@pytest.mark.slow
def test_what_runs_elsewhere_is_still_there(outcomes: dict[str, dict[str, str]]) -> None:
    for end in ("shutdown of a connected pool", "datasets' extract"):
        assert "Error: " in outcomes["own"][end]
    assert outcomes["joined"]["a new client"] == "nothing"
