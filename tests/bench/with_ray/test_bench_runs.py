"""Each bench runs, does the same work for everyone, and says so. The tests do not look at what it measures."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commandline import run_bench, run_command

from dinov3_ray.bench.gpu.acceptance import BASE
from dinov3_ray.bench.proof import arms
from dinov3_ray.bench.proof.arms import ProofSettings
from dinov3_ray.bench.proof.measuring import measure_proof
from dinov3_ray.bench.scaling import BatchShape, ScalingPlan, cpu_seconds
from dinov3_ray.bench.throughput import CONTENDERS, missing_reason
from dinov3_ray.bench.training_steps import KINDS
from dinov3_ray.scenes.scene_teacher import SceneTeaching


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
    assert all(report[name] > 0 for name in ("pool", "numpy_actor", "torch_actor", "copy", "token", "nothing"))
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
    peers = report["reading_beside_others"]
    assert isinstance(peers, list)
    assert [peer["name"] for peer in peers][:2] == ["FeatureStore", "NumPy memmap of an export"]
    assert len(peers) == 5
    assert all(peer["missing"] or peer["median"] > 0 for peer in peers)
    print(report)


@pytest.mark.slow
def test_the_loops_run(ray_cluster: str) -> None:
    options = ("--replicas", "1", "--steps", "8", "--repeats", "1", "--step-seconds", "0.05", "--address", ray_cluster)
    report = run_bench("training", *options)
    pools = report["pools"]
    assert isinstance(pools, list)
    (pool,) = pools
    assert list(pool["kinds"]) == list(KINDS)
    for kind in KINDS:
        (seen,) = pool["kinds"][kind]["passes"]
        assert seen["steps"] == (8 if kind in KINDS[:2] else 2)
        assert seen["seconds"] >= 0.05 * seen["steps"]
    print(pool)


@pytest.mark.slow
def test_the_smallest_run(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = (BatchShape(rows=1, side=7), BatchShape(rows=8))
    plan = ScalingPlan((1,), (2,), (7,), (1,), base=1, seconds=0.1, calibration=calibration)
    monkeypatch.setattr("dinov3_ray.bench.scaling.QUICK", plan)
    report: dict[str, Any] = run_bench("scaling", "--quick", "--address", ray_cluster)
    assert [(point["axis"], point["value"]) for point in report["points"]] == [
        ("replicas", 1),
        ("batch", 2),
        ("map", 7),
        ("clients", 1),
    ]
    for point in report["points"]:
        assert point["measured"] > 0
        assert point["ratio"] == pytest.approx(point["predicted"] / point["measured"])
    assert set(report["walls"]) > {"CPU of this node"}


@pytest.mark.slow
def test_all_that_a_gpu_would_show_without_one(ray_cluster: str, tmp_path: Path) -> None:
    # The parts without Ray but one are left out: each starts processes that take seconds to import torch.
    path, wanted = tmp_path / "gpu.json", ("large-teacher", "pool", "extraction", "training")
    options = ["--device", "cpu", "--quick", "--json", path, "--address", ray_cluster]
    done = run_command("bench", "gpu", *options, *(word for name in wanted for word in ("--part", name)))
    report = json.loads(path.read_text())
    assert done.exit_code == 0, report
    parts = report["parts"]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(wanted, "done")
    assert [(row["model"], row["px"]) for row in parts["large-teacher"]["rows"]] == [("vit-test", 32), ("vit-test", 48)]
    for row in parts["large-teacher"]["rows"]:
        assert min(row["transformers"], row["eager"], row["bound"]) > 0
    for name, last in (("pool", "pool"), ("extraction", "extract")):
        *bare, ours = parts[name]["rows"]
        assert ours["what"] == last
        assert max(row[BASE] for row in bare) == 1.0
        assert ours[BASE] == pytest.approx(ours["img/s"] / max(row["img/s"] for row in bare))
    assert [row["ms per step"] > 0 for row in parts["training"]["rows"]] == [True] * 3
    assert [verdict["passed"] for verdict in report["verdicts"]] == [None] * 4
    assert "| pool |" in done.stdout
    print(done.stdout)


@pytest.mark.usefixtures("ray_cluster")
def test_cpu_time_is_of_this_process_and_more() -> None:
    own = sum(os.times()[:2])
    seconds = cpu_seconds()
    assert seconds is not None
    # Ray's processes are counted too; that of one which ends goes with it, so that the sum need not grow.
    assert seconds >= own + 0.1


def test_distillation_through_pools_of_ray(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teaching = SceneTeaching(side=32, scenes=6, steps=2, batch=4)
    small = ProofSettings(3, 3, 10, 5, steps=2, label_batch=2, distil_steps=2, batch=4, channels=16, teaching=teaching)
    monkeypatch.setattr(arms, "QUICK_PROOF", small)
    arguments = ["--quick", "--seeds", 2, "--address", ray_cluster, "--out", tmp_path / "out", "--json"]
    result = run_command("bench", "distillation", *arguments, XDG_CACHE_HOME=str(tmp_path / "cache"))
    report = json.loads(result.stdout)
    assert report["seeds"] == 2
    assert result.exit_code == bool(report["complaints"])
    for complaint in report["complaints"]:
        assert complaint in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gains.png", "predictions.png"]
    # The pools' targets are the local teachers', so that all that follows is the same.
    (tmp_path / "work").mkdir()
    local = measure_proof(
        replace(small, seeds=2), tmp_path / "work", None, print, cache=tmp_path / "cache" / "dinov3_ray"
    )
    assert local.as_dict() == report
