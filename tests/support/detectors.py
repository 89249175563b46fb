"""Detectors of transformers with random weights, small enough to train in tests, and scenes with boxes for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from streams import picture
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    Trainer,
    TrainingArguments,
)

from dinov3_ray import FeatureSpec
from dinov3_ray.teacher import Teacher
from dinov3_ray.training.boxes import Boxes
from dinov3_ray.training.losses import DistillationLoss
from dinov3_ray.training.taps import FeatureTap

SPEC = FeatureSpec(feature_map=True)
TAP = "model.encoder.pan_blocks.0"  # stride 16 in both detectors
CHANNELS = 16  # of TAP's output
COUNT = 13  # scenes: the last batch of an epoch is a part, and so is its last optimizer step

_DETECTOR: dict[str, Any] = {
    "encoder_in_channels": [16, 24, 32],
    "encoder_hidden_dim": CHANNELS,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "d_model": 16,
    "decoder_in_channels": [CHANNELS] * 3,
    "decoder_ffn_dim": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_queries": 6,
    "num_denoising": 4,
    "num_labels": 3,
}


def rt_detr() -> nn.Module:
    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, **_DETECTOR))


def d_fine() -> nn.Module:
    torch.manual_seed(0)
    backbone = HGNetV2Config(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 24],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 3, 3],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    return DFineForObjectDetection(DFineConfig(backbone_config=backbone, **_DETECTOR))


class Scenes(Dataset[dict[str, Any]]):
    """Pictures with none, one or two boxes, and a column that no model takes."""

    def __init__(self, count: int = COUNT) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        objects = index % 3
        boxes = 0.2 + 0.4 * torch.rand(objects, 4, generator=generator)
        labels = {"class_labels": torch.arange(objects), "boxes": boxes}
        return {"pixel_values": picture(index, (64, 64)) / 255, "labels": labels, "index": index}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    assert "index" not in items[0], "Trainer has removed it"
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": [i["labels"] for i in items],
    }


def options(model: nn.Module, folder: Path, **arguments: Any) -> dict[str, Any]:
    """A trainer's arguments: two epochs of 7 batches, with 3 optimizer steps each, all of them logged."""
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": True,
    }
    return {
        "model": model,
        "args": TrainingArguments(str(folder), **{**defaults, **arguments}),
        "train_dataset": Scenes(),
        "eval_dataset": Scenes(3),
        "data_collator": collate,
    }


class InTheLoop(Trainer):
    """A ``Trainer`` that calls a local teacher in its loss: what a training with a pool must be equal to."""

    def __init__(self, *, teacher: Teacher, distill: DistillationLoss, weight: float, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.teacher, self.distill, self.weight = teacher, distill, weight

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        with FeatureTap(model, TAP) as tap:
            loss: Tensor = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            targets = self.teacher.extract(inputs["pixel_values"], SPEC)
            boxes = Boxes.of([label["boxes"] for label in inputs["labels"]], format="xywh")
            return loss + self.weight * self.distill(tap.take(), targets, boxes)


def losses_of(trainer: Trainer) -> list[tuple[int, float]]:
    """(step, loss) of each optimizer step that was logged."""
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
