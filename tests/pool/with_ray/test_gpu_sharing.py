"""A pool leaves GPUs to trainers; who waits for GPUs that the other holds is told so; and none has two tenants."""

from __future__ import annotations

import pytest
from script_process import own_ray, run_script


@pytest.mark.slow
def test_pool_and_trainer_share_two_gpus() -> None:
    with own_ray() as environment:
        seen, _ = run_script("gpu_sharing.py", env=environment)
    assert (seen["left"], seen["taken"]) == (1, 2)
    assert seen["nobody waits"] == ""
    assert "leave_gpus=2 must leave the pool num_gpus=1 of the cluster's 2 GPUs at least" in seen["leave too many"]
    assert "others wait for 1 GPU" in seen["trainer waits"]
    assert "of the cluster's 2 GPUs this pool holds 2, others 0" in seen["trainer waits"]
    assert "leave_gpus=N" in seen["trainer waits"]
    assert "others wait for 1 GPU" in " ".join(seen["status"].split())
    assert "0 of 1 replicas ready" in seen["pool waits"]
    assert "replicas wait for 1 GPU: of the cluster's 2 GPUs this pool holds 0, others 2" in seen["pool waits"]
    assert seen["segments"] == "expandable_segments:True"
    assert seen["double tenants"] == []
    assert seen["stopped is gone"]
