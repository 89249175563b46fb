"""Ray Train's TorchTrainer next to a pool, on one cluster."""

from __future__ import annotations

from pathlib import Path

import loops
import pytest
import ranks
import ray
import ray_training
import streams
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from dinov3_ray import TeacherPool
from dinov3_ray.testing import FakeTeacher

WORKERS = 2
for module in (loops, ranks, ray_training, streams):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import the tests


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_its_workers_train_with_a_pool_as_with_a_teacher_each_though_one_fails(tmp_path: Path) -> None:
    with TeacherPool.start(FakeTeacher.factory(), name="beside", replicas=1) as pool:
        TorchTrainer(
            ray_training.train,
            train_loop_config={"folder": str(tmp_path), "pool": "beside"},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=str(tmp_path / "runs"), failure_config=FailureConfig(max_failures=1)),
        ).fit()
        assert pool.status().ready == 1
    for rank in range(WORKERS):
        outcome = torch.load(tmp_path / f"{rank}.pt")
        assert outcome["resumed"]
        assert len(outcome["ours"]) == ray_training.EPOCHS * 4  # 11 images each, in batches of 3
        assert outcome["ours"] == outcome["expected"]
