"""One rank of a run of transformers' Trainer that distils from a pool. Light to import: spawned ranks do it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import no_datasets  # noqa: F401 - for transformers
import torch
from streams import picture
from torch.utils.data import IterableDataset
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

from dinov3_ray.integrations.transformers import DistillingTrainer
from dinov3_ray.testing import FakeTeacher

SAMPLES = 12
BATCH = 2
CHANNELS = 24  # of the teacher


class Stream(IterableDataset[dict[str, Any]]):
    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._samples)


def trainer_of(
    world: int, folder: Path, samples: Any, *, teacher: Any, address: str | None = None, **arguments: Any
) -> DistillingTrainer:
    torch.manual_seed(0)
    student = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_labels=3)
    )
    training = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        optim="sgd",
        learning_rate=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        **arguments,
    )
    return DistillingTrainer(
        student, training, train_dataset=samples, teacher=teacher, address=address, taps="resnet.encoder.stages.1"
    )


def train(rank: int, world: int, port: int, folder: Path, pool: str | None, address: str | None) -> None:
    """Two epochs of optimizer steps over two batches: one batch at each of two ranks, or both at one.

    Without a pool, the teacher is a local one.
    """
    torch.set_num_threads(1)
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate sets more
        os.environ.update({name: str(value) for name, value in ranks.items()})
    samples = [{"pixel_values": picture(index, (64, 64)) / 255, "labels": index % 3} for index in range(SAMPLES)]
    teacher = pool or FakeTeacher(hidden_size=CHANNELS)
    trainer = trainer_of(
        world,
        folder,
        samples,
        teacher=teacher,
        address=address,
        num_train_epochs=2,
        gradient_accumulation_steps=2 // world,
    )
    torch.rand(rank)  # other random numbers in each rank: all must begin with the first one's projector
    trainer.train()
    losses = [(entry["loss"], entry["distillation_loss"]) for entry in trainer.state.log_history if "loss" in entry]
    projector = trainer.distillation
    assert projector is not None
    outcome = {
        "losses": losses,
        "parameters": dict(trainer.model.named_parameters()),
        "projector": dict(projector.named_parameters()),
    }
    if world > 1:  # of a stream, the first rank draws for all, in calls that all must make at the same time
        uneven = FakeTeacher(hidden_size=CHANNELS, delay=0.01 + 0.1 * rank)
        streaming = trainer_of(world, folder, Stream(samples), teacher=uneven, max_steps=7)
        streaming.train()
        outcome["streamed"] = streaming.statistics().steps
    torch.save(outcome, folder / f"{world}-{rank}.pt")
