"""A student of a DINOv3 and a SigLIP2 at once, each in a pool of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers_models import KINDS, write_transformers

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, TeacherPool
from dinov3_ray.model import TransformersTeacher
from dinov3_ray.training.losses import DistillationLoss
from dinov3_ray.training.prefetch import prefetch


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformers(tmp_path_factory.mktemp("siglip2") / "model", *KINDS["siglip2"])


@pytest.mark.slow
def test_a_student_learns_of_two_pools_at_once(tiny_checkpoint: Path, siglip: Path) -> None:
    config = DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64)
    own = {"dinov3": DinoV3Teacher(config), "siglip2": TransformersTeacher(siglip, dtype="float32")}
    specs = {"dinov3": FeatureSpec(cls=True, feature_map=True), "siglip2": FeatureSpec(feature_map=True)}
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader([{"img": torch.rand(3, 64, 64, generator=generator)} for _ in range(8)], batch_size=4)
    torch.manual_seed(0)
    trunk = nn.Conv2d(3, 8, 16, 16)
    losses = nn.ModuleDict(
        {name: DistillationLoss("cosine", projector=nn.Conv2d(8, own[name].hidden_size, 1)) for name in own}
    )
    optimizer = torch.optim.SGD([*trunk.parameters(), *losses.parameters()], lr=0.5)
    history = []
    with (
        TeacherPool.start(config, name="dinov3", replicas=1, local_mode=True) as dinov3,
        TeacherPool.start(
            TransformersTeacher.factory(siglip, dtype="float32"), name="siglip2", replicas=1, local_mode=True
        ) as siglip2,
    ):
        pools = {"dinov3": dinov3.teacher(), "siglip2": siglip2.teacher()}
        batches = prefetch(pools, loader, specs, images=lambda batch: batch["img"])
        for _ in range(3):
            for batch, targets in batches:
                for name, teacher in own.items():
                    expected = dict(teacher.extract(batch["img"], specs[name]).named())
                    assert all(torch.equal(tensor, expected[key]) for key, tensor in targets[name].named())
                    assert targets[name].fingerprint == teacher.fingerprint
                student = trunk(batch["img"])
                loss = torch.stack([losses[name](student, targets[name]) for name in own]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                history.append(loss.item())
    assert history[-1] < history[0]
