"""The student, the batches and the steps that the tests of several trainers' loops share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from ranks import SPEC, Distilled, Numbered
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dinov3_ray import Features
from dinov3_ray.teacher import Extractor

CHANNELS = 16  # of a FakeTeacher

Batch = tuple[Tensor, Tensor]
Step = tuple[list[int], float, bool]
"""The numbers of a batch's images, its loss, and whether the optimizer stepped after it."""


def student() -> tuple[nn.Module, torch.optim.Optimizer]:
    """With its loss inside; always the same."""
    torch.manual_seed(0)
    model = Distilled(CHANNELS)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def numbered_loader(count: int, **options: Any) -> DataLoader[Batch]:
    """Batches of 4 (numbers, images), shuffled anew in each epoch, always in the same way."""
    generator = torch.Generator().manual_seed(7)
    return DataLoader(Numbered(count), batch_size=4, shuffle=True, generator=generator, **options)


def images_of(batch: Batch) -> Tensor:
    return batch[1]


def in_the_loop(teacher: Extractor, loader: Iterable[Batch]) -> Iterator[tuple[Batch, Features]]:
    """What a prefetch must be equal to: the teacher is called as each batch comes."""
    for batch in loader:
        yield batch, teacher.extract(images_of(batch), SPEC)
