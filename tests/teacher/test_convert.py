"""Official checkpoints, converted: against forwards written independently in the official layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_convnext import forward_convnext, random_convnext
from reference_vit import forward_vit, random_vit
from safetensors.torch import load_file
from torch import Tensor

from dinov3_ray.checkpoint import convert_checkpoint, fingerprint, load_model, verify
from dinov3_ray.config import DinoV3Config
from dinov3_ray.config.architecture import ConvNextArchitecture, ViTArchitecture
from dinov3_ray.errors import CheckpointError, ConfigError

PLAIN = {"width": 128, "heads": 2, "blocks": 3, "inner": 192, "swiglu": False, "registers": 4, "qkv_bias": True}
SWIGLU = {**PLAIN, "swiglu": True}
LIKE_7B = {**SWIGLU, "qkv_bias": False, "heads": 1}  # heads of 128, which only `periods` tells
CONVNEXT = ((16, 24, 32, 48), (1, 2, 3, 1))


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(3))


def output(root: Path, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return load_model(DinoV3Config(root))(pixels).double()


@pytest.fixture
def official(tmp_path: Path) -> Path:
    path = tmp_path / "dinov3_tiny_pretrain_lvd1689m-00000000.pth"
    torch.save(random_vit(**PLAIN), path)
    return path


class TestAgainstTheReference:
    @pytest.mark.parametrize("shape", [PLAIN, SWIGLU, LIKE_7B], ids=["plain", "swiglu", "like-7b"])
    def test_vit(self, tmp_path: Path, shape: dict[str, Any]) -> None:
        weights = random_vit(**shape)
        torch.save(weights, tmp_path / "official.pth")
        made = convert_checkpoint(tmp_path / "official.pth", tmp_path / "model")
        assert isinstance(made.architecture, ViTArchitecture)
        assert (made.architecture.num_heads, made.architecture.gated_mlp) == (shape["heads"], shape["swiglu"])
        assert DinoV3Config(tmp_path / "model").architecture == made.architecture
        pixels = images(96, 176)
        expected = forward_vit(weights, pixels, heads=shape["heads"])
        torch.testing.assert_close(output(tmp_path / "model", pixels), expected, rtol=0, atol=1e-5)

    def test_vit_whose_key_bias_nothing_masks(self, tmp_path: Path) -> None:
        weights = random_vit(**PLAIN)
        masks = {name: torch.ones_like(weights[name]) for name in weights if name.endswith("bias_mask")}
        torch.save({k: v for k, v in weights.items() if k not in masks}, tmp_path / "official.pth")
        made = convert_checkpoint(tmp_path / "official.pth", tmp_path / "model")
        assert isinstance(made.architecture, ViTArchitecture)
        assert made.architecture.key_bias
        pixels = images(64, 64)
        expected = forward_vit(weights | masks, pixels, heads=2)
        torch.testing.assert_close(output(tmp_path / "model", pixels), expected, rtol=0, atol=1e-5)

    def test_convnext(self, tmp_path: Path) -> None:
        weights = random_convnext(*CONVNEXT)
        torch.save(weights, tmp_path / "official.pth")
        made = convert_checkpoint(tmp_path / "official.pth", tmp_path / "model")
        assert made.architecture == ConvNextArchitecture(*CONVNEXT)
        pixels = images(96, 160)
        expected = forward_convnext(weights, pixels)
        torch.testing.assert_close(output(tmp_path / "model", pixels), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("spoilt", ["blocks.1.ls2.gamma", "storage_tokens", "blocks.0.attn.qkv.bias", "norm.bias"])
    def test_the_reference_notices_each_part(self, spoilt: str) -> None:
        """The comparison above is worth something only if no part is too weak to show."""
        weights, pixels = random_vit(**PLAIN), images(64, 64)
        changed = weights | {spoilt: weights[spoilt] * 1.01}
        assert (forward_vit(weights, pixels, heads=2) - forward_vit(changed, pixels, heads=2)).abs().max() > 1e-4


class TestFiles:
    def test_training_checkpoint(self, official: Path, tmp_path: Path) -> None:
        teacher = {f"backbone.{name}": tensor for name, tensor in random_vit(**PLAIN).items()}
        torch.save({"teacher": teacher | {"dino_head.weight": torch.ones(3)}}, tmp_path / "training.pth")
        convert_checkpoint(official, tmp_path / "a")
        convert_checkpoint(tmp_path / "training.pth", tmp_path / "b", shard_bytes=500_000)
        same = [DinoV3Config(tmp_path / name) for name in "ab"]
        assert len(verify(same[1]).files) > 1
        assert fingerprint(same[0]) == fingerprint(same[1])

    def test_older_file_format_and_bfloat16(self, tmp_path: Path) -> None:
        weights = {
            name: tensor if name.endswith("bias_mask") else tensor.bfloat16()
            for name, tensor in random_vit(**PLAIN).items()
        }
        torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        convert_checkpoint(tmp_path / "old.pth", tmp_path / "model")
        stored = load_file(tmp_path / "model" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert torch.equal(stored["layer.2.attention.k_proj.weight"], weights["blocks.2.attn.qkv.weight"][128:256])

    def test_what_only_training_needs_is_dropped(self, tmp_path: Path) -> None:
        weights = random_vit(**PLAIN) | {
            "local_cls_norm.weight": torch.ones(128),
            "local_cls_norm.bias": torch.ones(128),
        }
        torch.save(weights, tmp_path / "official.pth")
        made = convert_checkpoint(tmp_path / "official.pth", tmp_path / "model")
        assert verify(DinoV3Config(tmp_path / "model")).shapes.keys() == made.architecture.tensors().keys()

    @pytest.mark.parametrize(
        ("name", "option", "statistics", "mean"),
        [
            ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", "auto", "sat493m", (0.430, 0.411, 0.296)),
            ("dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", "auto", "lvd1689m", (0.485, 0.456, 0.406)),
            ("mine.pth", "sat493m", "sat493m", (0.430, 0.411, 0.296)),
        ],
    )
    def test_statistics(
        self, official: Path, tmp_path: Path, name: str, option: str, statistics: str, mean: tuple[float, ...]
    ) -> None:
        source = official.rename(tmp_path / name)
        made = convert_checkpoint(source, tmp_path / "model", statistics=option, image_size=(256, 384))
        config = DinoV3Config(made.directory)
        assert (made.statistics, config.preprocessing.mean, config.image_size) == (statistics, mean, (256, 384))


class Surprise:
    """What ``weights_only`` must not run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code from a checkpoint was run",))


class TestRefused:
    def refused(self, content: object, tmp_path: Path, message: str) -> None:
        torch.save(content, tmp_path / "wrong.pth")
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(tmp_path / "wrong.pth", tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_missing_or_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be read"):
            convert_checkpoint(tmp_path / "nowhere.pth", tmp_path / "model")
        (tmp_path / "text.pth").write_text("not a checkpoint")
        with pytest.raises(CheckpointError, match="cannot be read"):
            convert_checkpoint(tmp_path / "text.pth", tmp_path / "model")

    def test_truncated(self, official: Path, tmp_path: Path) -> None:
        official.write_bytes(official.read_bytes()[:-2000])
        with pytest.raises(CheckpointError, match="cannot be read"):
            convert_checkpoint(official, tmp_path / "model")

    def test_code(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.refused({"weights": Surprise()}, tmp_path, "cannot be read as a torch checkpoint of plain tensors")
        assert "was run" not in capsys.readouterr().out

    def test_something_else(self, tmp_path: Path) -> None:
        self.refused([1, 2], tmp_path, "must hold a state dict of tensors; found a list")
        self.refused({"epoch": 3}, tmp_path, "must hold a state dict of tensors; found epoch")
        self.refused({"fc.weight": torch.ones(2)}, tmp_path, r"no published DINOv3 has: fc\.weight \[2\]")

    def test_unknown_missing_and_wrong_tensors(self, tmp_path: Path) -> None:
        weights = random_vit(**PLAIN)
        self.refused(weights | {"cls_norm.weight": torch.ones(128)}, tmp_path, r"cls_norm\.weight \[128\]")
        short = weights | {"norm.bias": torch.ones(64)}
        self.refused(short, tmp_path, r"norm\.bias has the wrong shape: expected \[128\], found \[64\]")
        del weights["blocks.1.mlp.fc1.bias"]
        self.refused(weights, tmp_path, r"layer\.1\.mlp\.up_proj\.bias is missing")
        del weights["storage_tokens"]
        self.refused(weights, tmp_path, "is not an official DINOv3 checkpoint")

    def test_other_rope_or_mask(self, tmp_path: Path) -> None:
        weights = random_vit(**PLAIN)
        periods = weights["rope_embed.periods"]
        self.refused(weights | {"rope_embed.periods": periods**1.1}, tmp_path, "must be those of base 100")
        mask = weights["blocks.0.attn.qkv.bias_mask"]
        spoilt = weights | {"blocks.0.attn.qkv.bias_mask": torch.full_like(mask, float("nan"))}
        self.refused(spoilt, tmp_path, "bias_mask must be 1 for query and value, 0 for key")

    def test_mixed_dtypes(self, tmp_path: Path) -> None:
        weights = random_vit(**PLAIN)
        weights["norm.bias"] = weights["norm.bias"].bfloat16()
        self.refused(weights, tmp_path, r"throughout; found torch\.bfloat16, torch\.float32")

    def test_options(self, official: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="statistics must be one of auto, lvd1689m, sat493m; got 'coco'"):
            convert_checkpoint(official, tmp_path / "model", statistics="coco")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.txt").write_text("precious")
        with pytest.raises(CheckpointError, match="is in use already"):
            convert_checkpoint(official, tmp_path / "model")


def test_rope_periods_may_be_rounded_to_bfloat16(tmp_path: Path) -> None:
    """As in released files."""
    weights = random_vit(**PLAIN)
    weights["rope_embed.periods"] = weights["rope_embed.periods"].bfloat16()
    torch.save(weights, tmp_path / "official.pth")
    made = convert_checkpoint(tmp_path / "official.pth", tmp_path / "model")
    assert isinstance(made.architecture, ViTArchitecture)
    assert made.architecture == replace(made.architecture, num_heads=2, rope_theta=100.0)
