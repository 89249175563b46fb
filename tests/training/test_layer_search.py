"""The layer that is found of students of many kinds: one from which they learn, or an error that says what to name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from detectors import d_fine, rt_detr
from torch import Tensor, nn
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
)

from dinov3_ray.errors import ConfigError
from dinov3_ray.training import recipes
from dinov3_ray.training.layer_search import find_layer

PARTS = ("layers", "ffn_dim", "attention_heads")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


class PlainViT(nn.Module):
    """A ViT of torch's own layers, which have the tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 48, 16, 16)
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 2, 192), 3)
        self.head = nn.Linear(48, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.blocks(self.embed(pixel_values).flatten(2).permute(2, 0, 1))
        scores: Tensor = self.head(tokens.mean(0))
        return scores


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=(96, 160), **SIZES))


def swin() -> nn.Module:
    return SwinModel(SwinConfig(embed_dim=8, depths=[1, 1, 2], num_heads=[1, 2, 2], window_size=2))


def segformer() -> nn.Module:
    sizes = SegformerConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], decoder_hidden_size=16)
    return SegformerForSemanticSegmentation(sizes)


def example(height: int = 96, width: int = 160) -> dict[str, Tensor]:
    return {"pixel_values": torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (vit, "vit.embeddings.patch_embeddings.projection"),
        (PlainViT, "embed"),
        (swin, "embeddings.patch_embeddings.projection"),
        (segformer, "segformer.stages.0.blocks.0.attention.sequence_reduction.sequence_reduction"),
    ],
)
def test_a_student_of_tokens_is_told_to_name_a_layer_and_the_example_works(make: Any, found: str) -> None:
    torch.manual_seed(0)
    student, images = make(), example()
    recipe = recipes.gram()
    with pytest.raises(ConfigError, match=rf"layers must be given .* found, of {found!r}, .* would learn") as caught:
        recipe.for_student(student, 16, images)
    said = re.search(r"such as layers='(.*)', select=(lambda .*)\)$", str(caught.value))
    assert said is not None
    distiller = recipe.for_student(student, 16, images, layers=said[1], select=eval(said[2]))
    with distiller.tap:
        student(**images)
        distiller.tap[said[1]].square().sum().backward()
    learning = sum(each.numel() for each in student.parameters() if each.grad is not None)
    assert learning > 0.8 * sum(each.numel() for each in student.parameters())
    recipe.for_student(student, 16, images, layers=found)  # who names it has it


@pytest.mark.slow
@pytest.mark.parametrize("make", [rt_detr, d_fine])
def test_a_detector_with_aifi_has_it_found(make: Any) -> None:
    assert find_layer(make(), example(64, 64), stride=32, prefers=("AIFI",)) == "model.encoder.aifi.0"
    assert find_layer(make(), example(64, 64)) == "model.backbone.model.encoder.stages.3"


def test_a_map_without_a_gradient_is_passed_over() -> None:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    sizes = {f"{part}_{name}": 2 if name != "ffn_dim" else 16 for part in ("encoder", "decoder") for name in PARTS}
    student = DetrForObjectDetection(DetrConfig(backbone_config=backbone, d_model=16, num_queries=4, **sizes))
    with pytest.raises(ConfigError, match=r"'model\.input_projection', is followed by tokens"):
        find_layer(student, example(128, 192), stride=32)  # its backbone is frozen as it comes
    found = find_layer(student.requires_grad_(True), example(128, 192), stride=32)
    assert found == "model.input_projection", "not model.position_embedding"


class WithHead(nn.Module):
    """A segmenter whose classifier is a convolution at the backbone's stride."""

    def __init__(self, *heads: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 16, 2, 2), nn.BatchNorm2d(16))
        self.heads = nn.ModuleList(nn.Conv2d(16, each, 1) for each in heads)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        deep = self.body(pixel_values).relu()
        return [nn.functional.interpolate(head(deep), scale_factor=16).softmax(1) for head in self.heads]


@pytest.mark.parametrize("heads", [(5,), (5, 4)])
def test_logits_are_not_the_layer(heads: tuple[int, ...]) -> None:
    assert find_layer(WithHead(*heads), example()) == "body"
    if len(heads) == 1:
        sizes = MobileNetV2Config(depth_multiplier=0.35, num_labels=5)
        student = MobileNetV2ForSemanticSegmentation(sizes)
        assert find_layer(student, example()) == "segmentation_head.dropout"


def test_a_backbone_that_ends_with_a_convolution_keeps_it() -> None:
    student = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 16, 2, 2))
    assert find_layer(student, torch.rand(1, 3, 64, 64)) == "2"


def test_a_plain_network_with_a_large_linear_head_keeps_its_last_map() -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 4 * 4, 512), nn.ReLU(), nn.Linear(512, 5))
    student = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 16, 16), nn.ReLU()), head)
    assert find_layer(student, torch.rand(1, 3, 64, 64)) == "0"


def test_a_batch_as_large_as_the_grid_is_not_taken_for_tokens() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 16, 16), nn.Linear(4, 4000)

        def forward(self, images: Tensor) -> Tensor:
            scores: Tensor = self.head(self.body(images).mean((2, 3))[:, None].expand(-1, 2, -1))
            return scores

    assert find_layer(Queries(), torch.rand(16, 3, 64, 64)) == "body"
