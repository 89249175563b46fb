"""One rank of a training whose batches accelerate reads in rank 0 and sends to all. Light to import: ranks do it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from streams import picture
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from dinov3_ray import FeatureSpec
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training.prefetch import prefetch

SPEC = FeatureSpec(feature_map=True)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from (picture(number, (32, 32)) for number in range(44))


def train(rank: int, world: int, port: int, folder: Path) -> None:
    """Two epochs; rank 1 has the slower teacher. Leaves the sum of the images of each step in ``folder``."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ.update(rendezvous, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    loader = DataLoader(Stream(), batch_size=2)
    model, loader = accelerator.prepare(nn.Conv2d(3, 16, 16, 16), loader)
    seen = []
    stream = prefetch(FakeTeacher(delay=0.03 * rank), loader, SPEC)
    for _ in range(2):
        for images, targets in stream:
            assert torch.equal(targets.feature_map, FakeTeacher().extract(images, SPEC).feature_map)
            with accelerator.accumulate(model):  # whose gradients are averaged between draws
                accelerator.backward((model(images.float()) - targets.feature_map).square().mean())
            seen.append((int(images.long().sum()), accelerator.sync_gradients))
    torch.save(seen, folder / f"{rank}.pt")
    accelerator.end_training()
