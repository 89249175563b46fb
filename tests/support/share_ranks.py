"""One rank of a process group that trains with a share of the gradient: ``python share_ranks.py RANK WORLD FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinov3_ray import Features
from dinov3_ray.training import recipes
from dinov3_ray.training.distiller import Distiller
from dinov3_ray.training.losses import PhiS

STEPS = 6


class Student(nn.Module):
    """A map of stride 16, a head, and the distiller of a recipe, all in what DDP wraps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Tanh(), nn.Conv2d(8, 2, 1))
        recipe = recipes.rtdetrv4(weight=1.0, share=0.2)
        self.distiller: Distiller = recipe.for_student(self.net, 4, torch.rand(1, 3, 64, 64), layers="1")

    def forward(self, images: Tensor, targets: Features, task: float) -> Tensor:
        with self.distiller.tap:
            loss: Tensor = task * self.net(images).square().mean() + self.distiller(targets)
        return loss


def batch_of(step: int, rank: int) -> tuple[Tensor, Features, float]:
    """What a rank sees in a step, and the task's weight in it: another one on each rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    return images, Features(feature_map=torch.randn(2, 4, 4, 4, generator=generator)), 1.0 + 4 * rank


def main() -> None:
    rank, world, file = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=world)
    student = Student()
    wrapped = DistributedDataParallel(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    weights = []
    for step in range(STEPS):
        wrapped(*batch_of(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append(student.distiller.weight)
    statistics = PhiS(4)
    first = batch_of(0, rank)[1].feature_map
    assert first is not None
    statistics((1 + rank) * first)  # fitted on the first batch of all ranks
    state = student.state_dict()
    torch.save({"weights": weights, "state": state, "phi_s": statistics.state_dict()}, f"{file}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
