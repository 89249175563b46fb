"""The worked example: RT-DETRv2 learns to detect, and to see like a DINOv3 teacher, on scenes of oriented objects.

What a user's own loop needs is in :meth:`Training.run`: a tap, a loss, a prefetch.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

from dinov3_ray import DinoV3Config, FeatureSpec, RemoteTeacher, TeacherPool
from dinov3_ray.training.boxes import Boxes
from dinov3_ray.training.losses import DistillationLoss
from dinov3_ray.training.taps import FeatureTap

SIZE = (128, 160)
SCENES, BATCH, EPOCHS = 24, 2, 3
LAYER = "model.encoder.pan_blocks.0"  # the neck's output at stride 16, the teacher's patch
SPEC = FeatureSpec(feature_map=True)


class OrientedScenes(Dataset[tuple[Tensor, Tensor]]):
    """Rotated bars on noise, another view of each scene in every epoch: uint8 [3,H,W] and corners [N,4,2] in pixels."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return SCENES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        chance = random.Random(f"{self._epoch} {index}")
        height, width = SIZE
        noise = np.random.default_rng(chance.randrange(2**32)).integers(60, 120, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        corners = []
        for _ in range(chance.randint(0 if index % 5 == 0 else 1, 4)):
            x, y, angle = chance.uniform(20, width - 20), chance.uniform(20, height - 20), chance.uniform(0, math.pi)
            along, across = chance.uniform(12, 25), chance.uniform(5, 10)
            cos, sin = math.cos(angle), math.sin(angle)
            corners.append(
                [
                    (x + a * along * cos - b * across * sin, y + a * along * sin + b * across * cos)
                    for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))
                ]
            )
            ImageDraw.Draw(image).polygon(corners[-1], fill=(230, 200, chance.randrange(256)))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels, torch.tensor(corners).reshape(-1, 4, 2)


def loader(epoch: int, done: int) -> DataLoader[tuple[Tensor, list[Tensor]]]:
    """An epoch's batches from number ``done`` on: its order is a matter of its number alone."""
    order = torch.randperm(SCENES, generator=torch.Generator().manual_seed(epoch)).tolist()
    return DataLoader(OrientedScenes(epoch), BATCH, sampler=order[done * BATCH :], collate_fn=collate)


def collate(scenes: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    images, corners = zip(*scenes, strict=True)
    return torch.stack(images), list(corners)


def labels_of(corners: list[Tensor]) -> list[dict[str, Tensor]]:
    """DETR's labels: the upright hulls, as shares of the image."""
    labels = []
    for each in corners:
        shares = each / torch.tensor(SIZE[::-1])
        low, high = (shares.amin(1), shares.amax(1)) if len(each) else (torch.zeros(0, 2), torch.zeros(0, 2))
        boxes = torch.cat([(low + high) / 2, high - low], 1).clamp(0, 1)
        labels.append({"class_labels": torch.zeros(len(each), dtype=torch.long), "boxes": boxes})
    return labels


def detector() -> RTDetrV2ForObjectDetection:
    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[24, 32, 48],
        encoder_hidden_dim=32,
        d_model=32,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=64,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_n_points=2,
        num_queries=20,
        num_denoising=0,
        num_labels=1,
    )
    return RTDetrV2ForObjectDetection(config)


@dataclass
class Training:
    """A run that can stop, be saved and go on."""

    teacher: RemoteTeacher
    channels: int
    epoch: int = 0
    done: int = 0  # batches of the epoch; the loader is further ahead, since targets are prefetched
    losses: list[float] = field(default_factory=list)
    distilled: list[float] = field(default_factory=list)
    stream: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.student = detector()
        self.distill = DistillationLoss(
            "cosine", projector=torch.nn.Conv2d(32, self.channels, 1), object_weight=1.0, background_weight=0.25
        )
        parameters = [*self.student.parameters(), *self.distill.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def run(self, stop_at: tuple[int, int] | None = None) -> None:
        with FeatureTap(self.student, LAYER) as tap:
            while self.epoch < EPOCHS:
                for (images, corners), targets in self.teacher.prefetch(loader(self.epoch, self.done), SPEC):
                    output = self.student(pixel_values=images.float() / 255, labels=labels_of(corners))
                    boxes = Boxes.of(corners, format="polygon", image_size=(SIZE[0], SIZE[1]), normalized=False)
                    distilled = self.distill(tap.take(), targets, boxes)
                    loss = output.loss + 5 * distilled
                    self.optimizer.zero_grad()
                    loss.backward()
                    self.optimizer.step()
                    self.done += 1
                    self.losses.append(loss.item())
                    self.distilled.append(distilled.item())
                    assert targets.feature_map is not None
                    self.stream.append(hashlib.sha256(targets.feature_map.numpy().tobytes()).hexdigest())
                    if (self.epoch, self.done) == stop_at:
                        return
                self.epoch, self.done = self.epoch + 1, 0

    def parts(self) -> dict[str, Any]:
        return {"student": self.student, "distill": self.distill, "optimizer": self.optimizer}

    def save(self, path: Path) -> None:
        states = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({**states, "place": (self.epoch, self.done)}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path)
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        self.epoch, self.done = saved["place"]


@pytest.fixture
def pool(tiny_checkpoint: Path) -> Iterator[TeacherPool]:
    config = DinoV3Config(tiny_checkpoint, dtype="float32", image_size=SIZE)
    with TeacherPool.start(config, name="detector", replicas=2, local_mode=True) as pool:
        yield pool


@pytest.mark.slow
def test_a_detector_learns_from_the_pool_and_resumes_where_it_stopped(pool: TeacherPool, tmp_path: Path) -> None:
    remote = pool.teacher()
    channels = remote.hidden_size
    assert channels is not None

    whole = Training(remote, channels)
    whole.run()
    steps = EPOCHS * SCENES // BATCH
    assert len(whole.distilled) == steps == 36
    first, last = sum(whole.distilled[:6]) / 6, sum(whole.distilled[-6:]) / 6
    print(
        f"distillation loss {first:.4f} -> {last:.4f} over {steps} steps; in all {whole.losses[0]:.2f} -> "
        f"{whole.losses[-1]:.2f}"
    )
    assert last < 0.8 * first
    assert len(set(whole.stream)) == steps, "no batch twice: each epoch has its own views"

    stopped = Training(remote, channels)
    stopped.run(stop_at=(1, 5))
    stopped.save(tmp_path / "checkpoint.pt")
    statistics = remote.statistics()
    assert statistics.in_flight == statistics.waiting == 0, "what was ahead was given up"
    resumed = Training(remote, channels)
    resumed.load(tmp_path / "checkpoint.pt")
    resumed.run()
    assert stopped.stream + resumed.stream == whole.stream
    assert stopped.losses + resumed.losses == whole.losses, "and so has all that was learnt from it"
