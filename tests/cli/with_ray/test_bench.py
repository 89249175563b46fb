"""The bench runs, does the same work for everyone, and says so. What it measures is no test's business."""

from __future__ import annotations

import pytest
from commandline import run_bench

from dinov3_ray.bench.throughput import CONTENDERS, missing_reason


@pytest.mark.slow
def test_pool_beside_its_peers(ray_cluster: str) -> None:
    report = run_bench("pool", "--quick", "--replicas", "1", "--batches", "20", "--address", ray_cluster)
    contenders = report["contenders"]
    assert isinstance(contenders, list)
    assert [row["name"] for row in contenders] == list(CONTENDERS)
    for row in contenders:
        if missing_reason(row["name"]) is None:
            assert 0 < row["share_of_ideal"] <= 1.01, row
        else:
            assert row["missing"]
        print(row)


@pytest.mark.slow
def test_transport(ray_cluster: str) -> None:
    report = run_bench("transport", "--quick", "--address", ray_cluster, in_process=False)
    assert report["result_bytes"] == 32 * 1024 * 14 * 14 * 2
    assert all(report[name] > 0 for name in ("pool", "torch_actor", "copy", "token", "nothing"))
    print(report)


@pytest.mark.slow
def test_dataset(ray_cluster: str) -> None:
    report = run_bench("dataset", "--quick", "--address", ray_cluster)
    decoded = report["decoded"]
    assert isinstance(decoded, list)
    assert [rate["name"] for rate in decoded] == ["bare loop", "extract", "map_batches with transformers, one actor"]
    assert all(rate["images"] == 64 and rate["images_per_second"] > 0 for rate in decoded)
    reading = report["reading"]
    assert isinstance(reading, list)
    assert [(row["dtype"], row["rows"]) for row in reading] == [("float32", 64), ("float16", 64), ("int8", 64)]
    print(report)


def test_router() -> None:
    report = run_bench("router", "--quick")
    decisions = report["decisions"]
    assert isinstance(decisions, list)
    assert [row["replicas"] for row in decisions] == [1, 4, 16, 100, 1000, 10_000]
    assert all(0 < row["choice"] < row["whole"] for row in decisions)
