"""The router bench runs. The test does not look at what it measures."""

from __future__ import annotations

from commandline import run_bench


def test_router() -> None:
    report = run_bench("router", "--quick")
    decisions = report["decisions"]
    assert isinstance(decisions, list)
    assert [row["replicas"] for row in decisions] == [1, 4, 16, 100, 1000, 10_000]
    assert all(0 < row["choice"] < row["whole"] for row in decisions)
