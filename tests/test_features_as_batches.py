"""Features in other people's hands: each walker over batches treats them as the tensors that they hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sample_features import random_features, same
from stores import build
from torch import Tensor, nn
from torch.distributed.utils import _apply_to_tensors
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, default_collate
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import nested_concat, nested_detach

from dinov3_ray import Features, FeatureSpec
from dinov3_ray.datasets import FeatureStore, TargetDataset
from dinov3_ray.testing import FakeTeacher

lightning = pytest.importorskip("lightning")
accelerate = pytest.importorskip("accelerate")

BFLOAT16 = dict.fromkeys(("cls", "feature_map", "registers", "layers.5", "layers.-1"), torch.bfloat16)


def to_bfloat16(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16)


def by_pytree(features: Features) -> Features:
    return pytree.tree_map(to_bfloat16, features)


def by_fsdp(features: Features) -> Features:
    return _apply_to_tensors(to_bfloat16, features)


def by_lightning(features: Features) -> Features:
    from lightning.fabric.utilities.apply_func import apply_to_collection

    return apply_to_collection(features, Tensor, to_bfloat16)


def by_a_lightning_precision(features: Features) -> Features:
    from lightning.pytorch.plugins.precision import HalfPrecision

    return HalfPrecision("bf16-true").convert_input(features)


def by_accelerate(features: Features) -> Features:
    from accelerate.utils import recursively_apply

    return recursively_apply(to_bfloat16, features, error_on_other_type=True)


def by_a_transformers_trainer(features: Features) -> Features:
    arguments = TrainingArguments(output_dir="never written", use_cpu=True, report_to=[])
    moved = Trainer(nn.Linear(1, 1), arguments)._prepare_input(features)
    return by_pytree(nested_detach(moved))


def by_to(features: Features) -> Features:
    return features.map(lambda _, tensor: to_bfloat16(tensor)).to("cpu", non_blocking=True)


WALKERS = [by_pytree, by_fsdp, by_lightning, by_a_lightning_precision, by_accelerate, by_a_transformers_trainer, by_to]


@pytest.mark.parametrize("walk", WALKERS)
def test_walkers_change_every_tensor_and_keep_the_type(walk: Callable[[Features], Features]) -> None:
    features = random_features(3)
    walked = walk(features)
    assert type(walked) is Features
    assert {name: tensor.dtype for name, tensor in walked.named()} == BFLOAT16
    assert same(walked, features.map(lambda _, tensor: to_bfloat16(tensor)))
    assert len(walked) == 3
    nested = pytree.tree_map(to_bfloat16, {"batch": [features, (features,)]})
    assert same(nested["batch"][1][0], walked)
    assert next(features.named())[1].dtype == torch.float32, "the features themselves are as they were"


def test_a_fingerprint_goes_through_pytree_and_copies() -> None:
    features = random_features(2)
    for again in (
        pytree.tree_map(torch.clone, features),
        copy.copy(features),
        copy.deepcopy(features),
        Features(features),
    ):
        assert again.fingerprint == "weights"
        assert same(again, features)
        assert again is not features
    assert pytree.tree_leaves_with_path(features)[0][0][0].key == "cls"


def test_dataloaders_join_samples(tmp_path: Path) -> None:
    samples = [random_features(1, seed=seed) for seed in range(4)]
    assert same(default_collate(samples), Features.cat(samples))
    collated = default_collate([{"img": torch.zeros(3), "targets": sample} for sample in samples])
    assert same(collated["targets"], Features.cat(samples))
    build(tmp_path, FeatureSpec(cls=True, layers=(1,)), FakeTeacher())
    dataset = TargetDataset(FeatureStore(tmp_path), read=lambda id_: torch.zeros(3))
    batches = [targets for _, targets in DataLoader(dataset, batch_size=4)]
    assert sum(len(targets) for targets in batches) == len(dataset)
    assert same(batches[0], Features.cat([dataset[index][1] for index in range(4)]))
    assert batches[0].layers[1].shape[0] == 4


def test_accelerate_moves_slices_joins_and_sends() -> None:
    from accelerate.utils import broadcast, concatenate, find_batch_size, gather, send_to_device, slice_tensors

    features = random_features(4)
    accelerate.PartialState(cpu=True)
    assert find_batch_size([{"targets": features}]) == 4
    halves = [slice_tensors(features, slice(0, 2)), slice_tensors(features, slice(2, 4))]
    assert [len(half) for half in halves] == [2, 2]
    for whole in (concatenate(halves), gather(features), broadcast(features), send_to_device(features, "cpu")):
        assert type(whole) is Features
        assert same(whole, features)
    assert same(nested_concat(halves[0], halves[1]), features)


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 8)

    def forward(self, targets: Features, others: list[Features]) -> dict[str, Any]:
        assert type(targets) is type(others[0]) is Features
        assert targets.cls is not None
        dtype = self.net.weight.dtype
        return {"loss": (self.net(targets.cls.to(dtype)) - others[0].layers[5].mean((2, 3)).to(dtype)).square().mean()}


def test_ddp_hands_them_to_the_model_and_learns(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = DistributedDataParallel(Student())
        student(random_features(2), [random_features(2)])["loss"].backward()
        assert student.module.net.weight.grad.abs().sum() > 0
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["32-true", "16-true", "bf16-true", "bf16-mixed", "64-true"])
def test_lightning_and_fabric_take_them_in_every_precision(precision: Any, tmp_path: Path) -> None:
    seen: list[Features] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 8)

        def training_step(self, batch: tuple[Tensor, Features], _: int) -> Tensor:
            seen.append(batch[1])
            assert batch[1].cls is not None
            return self.net(batch[1].cls.to(self.net.weight.dtype)).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    batches: Any = [(torch.zeros(2), random_features(2)) for _ in range(2)]
    trainer = lightning.Trainer(
        accelerator="cpu", precision=precision, max_epochs=1, default_root_dir=tmp_path, barebones=True
    )
    trainer.fit(Module(), DataLoader(batches, batch_size=None))
    fabric = lightning.Fabric(accelerator="cpu", precision=precision)
    model = fabric.setup_module(Student())
    model(random_features(2), [random_features(2)])
    wanted = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert [len(features) for features in seen] == [2, 2]
    for _, tensor in seen[0].named():
        assert tensor.dtype == wanted.get(precision, torch.float32)


def test_they_are_equal_only_to_themselves_and_never_false() -> None:
    features = random_features(2)
    assert features == features
    assert features != random_features(2)
    assert len({features, random_features(2)}) == 2
    assert features
    assert list(features) == ["cls", "feature_map", "registers", "layers"]
    assert partial(Features, **{name: features[name] for name in features})().layers[5] is features.layers[5]
