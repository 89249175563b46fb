"""One rank of a distributed training that shares a pool with the others. Light to import: spawned ranks do it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from streams import picture
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dinov3_ray import Features, FeatureSpec, RemoteTeacher
from dinov3_ray.training.losses import DistillationLoss
from dinov3_ray.training.taps import FeatureTap

SIZE = (64, 96)
SPEC = FeatureSpec(cls=True, feature_map=True)


class Numbered(Dataset[tuple[int, Tensor]]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, picture(index, SIZE)


class Distilled(nn.Module):
    """A student with its distillation loss inside, so that DDP averages the projector's gradients too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.GELU(), nn.Conv2d(8, 8, 1))
        self.loss = DistillationLoss("cosine", projector=nn.Conv2d(8, channels, 1))
        self.tap = FeatureTap(self.student, "2").attach()

    def forward(self, images: Tensor, targets: Features) -> Tensor:
        self.student(images.to(self.student[0].weight.dtype) / 255)
        loss: Tensor = self.loss(self.tap.take(), targets)
        return loss


def loader_of(rank: int, world: int, count: int, epoch: int) -> DataLoader[tuple[int, Tensor]]:
    dataset = Numbered(count)
    sampler: DistributedSampler[tuple[int, Tensor]] = DistributedSampler(dataset, world, rank, shuffle=True, seed=3)
    sampler.set_epoch(epoch)
    return DataLoader(dataset, batch_size=4, sampler=sampler)


def train(rank: int, world: int, folder: Path, pool: str, address: str, channels: int, count: int) -> None:
    """Two epochs; leaves (indices, targets) of each step and the final weights in ``folder``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model = DistributedDataParallel(Distilled(channels))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with RemoteTeacher(pool, address=address) as teacher:
        for epoch in range(2):
            loader = loader_of(rank, world, count, epoch)
            for (indices, images), targets in teacher.prefetch(loader, SPEC, images=lambda batch: batch[1]):
                optimizer.zero_grad()
                model(images, targets).backward()
                optimizer.step()
                seen.append((indices, targets.cls, targets.feature_map))
        in_flight = teacher.statistics().in_flight
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    torch.save({"seen": seen, "weights": weights, "in_flight": in_flight}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
