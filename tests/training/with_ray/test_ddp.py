"""Ranks of a distributed training share a pool by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
import torch.multiprocessing as mp
from streams import picture
from waiting import until

from dinov3_ray import DinoV3Config, DinoV3Teacher, TeacherPool

WORLD = 2
COUNT = 24


@pytest.mark.slow
def test_each_rank_gets_its_own_targets_and_they_are_those_of_one_process(
    ray_cluster: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = DinoV3Config(tiny_checkpoint, dtype="float32")
    with TeacherPool.start(config, name="ranks", replicas=1) as pool:
        arguments = (WORLD, tmp_path, "ranks", ray_cluster, config.hidden_size, COUNT)
        mp.start_processes(ranks.train, args=arguments, nprocs=WORLD, start_method="spawn")
        # Replicas tell of themselves every second.
        until(lambda: pool.status().images >= 2 * COUNT, "they have told of all images")
        assert pool.status().images == 2 * COUNT
    outcomes = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    local = DinoV3Teacher(config, "cpu")
    for rank, outcome in enumerate(outcomes):
        batches = [batch for epoch in range(2) for batch in ranks.loader_of(rank, WORLD, COUNT, epoch)]
        assert outcome["in_flight"] == 0
        assert len(outcome["seen"]) == len(batches) == 6
        for (seen, cls, feature_map), (indices, images) in zip(outcome["seen"], batches, strict=True):
            assert torch.equal(seen, indices)
            assert torch.equal(images, torch.stack([picture(index, ranks.SIZE) for index in indices.tolist()]))
            expected = local.extract(images, ranks.SPEC)
            assert torch.equal(cls, expected.cls)
            assert torch.equal(feature_map, expected.feature_map)
    for epoch in range(2):
        indices = [seen[0] for outcome in outcomes for seen in outcome["seen"][3 * epoch : 3 * epoch + 3]]
        assert sorted(torch.cat(indices).tolist()) == list(range(COUNT)), "each image once per epoch, at one rank"
    first, second = (outcome["weights"] for outcome in outcomes)
    assert all(torch.equal(first[name], second[name]) for name in first), "DDP kept the ranks together"
