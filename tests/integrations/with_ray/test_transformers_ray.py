"""Two ranks of transformers' Trainer with a pool of Ray actors."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from dinov3_ray import TeacherPool
from dinov3_ray.testing import FakeTeacher

pytest.importorskip("accelerate")

import trainer_ranks

WORLD = 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_train_as_one_that_accumulates_two_batches(ray_cluster: str, tmp_path: Path) -> None:
    with TeacherPool.start(FakeTeacher.factory(hidden_size=trainer_ranks.CHANNELS), name="trainer", replicas=1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (WORLD, port, tmp_path, "trainer", ray_cluster)
        mp.start_processes(trainer_ranks.train, args=arguments, nprocs=WORLD, start_method="spawn")
    trainer_ranks.train(0, 1, 0, tmp_path, None, None)
    first, second = (torch.load(tmp_path / f"{WORLD}-{rank}.pt") for rank in range(WORLD))
    expected = torch.load(tmp_path / "1-0.pt")
    assert first["streamed"] == second["streamed"] == 7
    assert len(expected["losses"]) == 2 * trainer_ranks.SAMPLES // (WORLD * trainer_ranks.BATCH)
    for kind in ("parameters", "projector"):
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name]), "equal in both ranks"
            torch.testing.assert_close(value, expected[kind][name])
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(expected["losses"]))
