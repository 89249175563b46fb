"""Official checkpoints, converted: against forwards written independently in the official layout."""

from __future__ import annotations

import hashlib
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_convnext import forward_convnext, random_convnext
from reference_vit import forward_vit, random_vit
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov3_ray.checkpoint import VARIANTS, convert_checkpoint, fingerprint, load_model, verify
from dinov3_ray.config import DinoV3Config
from dinov3_ray.config.architecture import ConvNextArchitecture, ViTArchitecture
from dinov3_ray.config.license import stated_license
from dinov3_ray.config.variants import OFFICIAL_HASHES, STATISTICS
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


def with_hash(path: Path, digits: str = "") -> Path:
    """The file under a name that ends with the first digits of its SHA-256, as Meta's do, or with those given."""
    digits = digits or hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f"{path.stem}-{digits}{path.suffix}"))


@pytest.fixture
def official(tmp_path: Path) -> Path:
    path = tmp_path / "dinov3_tiny_pretrain_lvd1689m.pth"
    torch.save(random_vit(**PLAIN), path)
    return with_hash(path)


class TestAgainstTheReference:
    @pytest.mark.parametrize("shape", [PLAIN, SWIGLU, LIKE_7B], ids=["plain", "swiglu", "like-7b"])
    def test_vit(self, tmp_path: Path, shape: dict[str, Any]) -> None:
        weights = random_vit(**shape)
        torch.save(weights, tmp_path / "lvd1689m.pth")
        made = convert_checkpoint(tmp_path / "lvd1689m.pth", tmp_path / "model")
        assert isinstance(made.architecture, ViTArchitecture)
        assert (made.architecture.num_heads, made.architecture.gated_mlp) == (shape["heads"], shape["swiglu"])
        assert DinoV3Config(tmp_path / "model").architecture == made.architecture
        pixels = images(96, 176)
        expected = forward_vit(weights, pixels, heads=shape["heads"])
        torch.testing.assert_close(output(tmp_path / "model", pixels), expected, rtol=0, atol=1e-5)

    def test_vit_whose_key_bias_nothing_masks(self, tmp_path: Path) -> None:
        weights = random_vit(**PLAIN)
        masks = {name: torch.ones_like(weights[name]) for name in weights if name.endswith("bias_mask")}
        torch.save({k: v for k, v in weights.items() if k not in masks}, tmp_path / "lvd1689m.pth")
        made = convert_checkpoint(tmp_path / "lvd1689m.pth", tmp_path / "model")
        assert isinstance(made.architecture, ViTArchitecture)
        assert made.architecture.key_bias
        pixels = images(64, 64)
        expected = forward_vit(weights | masks, pixels, heads=2)
        torch.testing.assert_close(output(tmp_path / "model", pixels), expected, rtol=0, atol=1e-5)

    def test_convnext(self, tmp_path: Path) -> None:
        weights = random_convnext(*CONVNEXT)
        torch.save(weights, tmp_path / "lvd1689m.pth")
        made = convert_checkpoint(tmp_path / "lvd1689m.pth", tmp_path / "model")
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
        torch.save({"teacher": teacher | {"dino_head.weight": torch.ones(3)}}, tmp_path / "training_lvd1689m.pth")
        convert_checkpoint(official, tmp_path / "a")
        convert_checkpoint(tmp_path / "training_lvd1689m.pth", tmp_path / "b", shard_bytes=500_000)
        same = [DinoV3Config(tmp_path / name) for name in "ab"]
        assert len(verify(same[1]).files) > 1
        assert fingerprint(same[0]) == fingerprint(same[1])

    def test_older_file_format_and_bfloat16(self, tmp_path: Path) -> None:
        weights = {
            name: tensor if name.endswith("bias_mask") else tensor.bfloat16()
            for name, tensor in random_vit(**PLAIN).items()
        }
        torch.save(weights, tmp_path / "old_lvd1689m.pth", _use_new_zipfile_serialization=False)
        convert_checkpoint(tmp_path / "old_lvd1689m.pth", tmp_path / "model")
        stored = load_file(tmp_path / "model" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert torch.equal(stored["layer.2.attention.k_proj.weight"], weights["blocks.2.attn.qkv.weight"][128:256])

    def test_what_only_training_needs_is_dropped(self, tmp_path: Path) -> None:
        weights = random_vit(**PLAIN) | {
            "local_cls_norm.weight": torch.ones(128),
            "local_cls_norm.bias": torch.ones(128),
        }
        torch.save(weights, tmp_path / "lvd1689m.pth")
        made = convert_checkpoint(tmp_path / "lvd1689m.pth", tmp_path / "model")
        assert verify(DinoV3Config(tmp_path / "model")).shapes.keys() == made.architecture.tensors().keys()

    def test_image_size(self, official: Path, tmp_path: Path) -> None:
        made = convert_checkpoint(official, tmp_path / "model", image_size=(256, 384))
        assert DinoV3Config(made.directory).image_size == (256, 384)
        assert DinoV3Config(convert_checkpoint(official, tmp_path / "other").directory).image_size == (224, 224)

    def test_head_and_projectors_are_left_out_and_named(self, tmp_path: Path) -> None:
        """As in EUPE's files."""
        extra = {"projectors.heads.dinov3radio.0.weight": torch.ones(2), "head.bias": torch.ones(5)}
        torch.save(random_vit(**PLAIN) | extra, tmp_path / "EUPE-ViT-T.pt")
        made = convert_checkpoint(tmp_path / "EUPE-ViT-T.pt", tmp_path / "model")
        assert made.notes == (
            "left out, since a teacher has no head: projectors.heads.dinov3radio.0.weight, head.bias",
        )
        assert stated_license(tmp_path / "model") == "fair-noncommercial-research-license"

    def test_without_a_mask_token_it_is_zero(self, tmp_path: Path) -> None:
        weights = random_vit(**PLAIN)
        del weights["mask_token"]
        torch.save(weights, tmp_path / "lvd1689m.pth")
        convert_checkpoint(tmp_path / "lvd1689m.pth", tmp_path / "model")
        assert not load_file(tmp_path / "model" / "model.safetensors")["embeddings.mask_token"].any()

    def test_safetensors_of_any_alignment(self, official: Path, tmp_path: Path) -> None:
        """Mapped where it is aligned, copied where it is not; named as what it is not."""
        weights = torch.load(official, weights_only=True)
        save_file(weights, tmp_path / "lvd1689m.pth")
        content = (tmp_path / "lvd1689m.pth").read_bytes()
        length = int.from_bytes(content[:8], "little")
        odd = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
        (tmp_path / "odd_lvd1689m.bin").write_bytes(odd)
        fingerprints = set()
        for source in (official, tmp_path / "lvd1689m.pth", tmp_path / "odd_lvd1689m.bin"):
            made = convert_checkpoint(source, tmp_path / "models" / source.stem)
            fingerprints.add(fingerprint(DinoV3Config(made.directory)))
        assert len(fingerprints) == 1


class TestStatistics:
    """Which mean and std the model directory gets, and why."""

    @pytest.mark.parametrize(
        ("name", "statistics"),
        [
            ("dinov3_vitl16_pretrain_sat493m.pth", "sat493m"),
            ("dinov3_vit7b16_sat493.pth", "sat493m"),
            ("DINOv3-ViT-L-SAT-493M.pt", "sat493m"),
            ("dinov3_vitl16_pretrain_lvd1689m.pth", "lvd1689m"),
            ("vit_small_patch16_dinov3.lvd1689m.safetensors", "lvd1689m"),
            ("EUPE-ViT-S.pt", "lvd1689m"),
        ],
    )
    def test_the_name_says_them(self, official: Path, tmp_path: Path, name: str, statistics: str) -> None:
        made = convert_checkpoint(official.rename(tmp_path / name), tmp_path / "model")
        rule = DinoV3Config(made.directory).preprocessing
        assert (made.statistics, (rule.mean, rule.std)) == (statistics, STATISTICS[statistics])

    @pytest.mark.parametrize("statistics", STATISTICS)
    def test_they_are_asked_for(self, official: Path, tmp_path: Path, statistics: str) -> None:
        source = official.rename(tmp_path / "mine.pth")
        with pytest.raises(ConfigError, match=r"must be given: neither .*mine\.pth nor .*'lvd1689m' or --statistics"):
            convert_checkpoint(source, tmp_path / "model")
        assert not (tmp_path / "model").exists()
        made = convert_checkpoint(source, tmp_path / "model", statistics=statistics)
        assert (made.statistics, DinoV3Config(made.directory).preprocessing.mean) == (
            statistics,
            STATISTICS[statistics][0],
        )

    def test_an_official_file_is_known_by_its_hash(
        self, official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digits = hashlib.sha256(official.read_bytes()).hexdigest()[:8]
        monkeypatch.setitem(OFFICIAL_HASHES, digits, "sat493m")
        made = convert_checkpoint(official.rename(tmp_path / "teacher.pth"), tmp_path / "model")
        assert made.statistics == "sat493m"
        assert stated_license(tmp_path / "model") == "dinov3-license"

    def test_the_satellite_vitl_is_known_by_its_tensors(
        self, official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only it has local_cls_norm among the ViT-L; a tiny one stands for it here."""
        weights = torch.load(official, weights_only=True)
        local = {"local_cls_norm.weight": torch.ones(128), "local_cls_norm.bias": torch.ones(128)}
        torch.save(weights | local, tmp_path / "teacher.pth")
        monkeypatch.setitem(VARIANTS, "vitl16", convert_checkpoint(official, tmp_path / "a").architecture)
        assert convert_checkpoint(tmp_path / "teacher.pth", tmp_path / "b").statistics == "sat493m"
        torch.save(weights | local, tmp_path / "lvd1689m.pth")
        with pytest.raises(ConfigError, match=r"must be given for .*since its name says lvd1689m, but"):
            convert_checkpoint(tmp_path / "lvd1689m.pth", tmp_path / "c")

    def test_unknown(self, official: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="statistics must be one of auto, lvd1689m, sat493m; got 'coco'"):
            convert_checkpoint(official, tmp_path / "model", statistics="coco")


class TestWrapped:
    """Training checkpoints: the backbone is found in whatever is around its tensors."""

    @pytest.mark.parametrize(
        "wrap",
        [
            "model",
            "state_dict",
            "teacher.backbone",
            "module",
            "_orig_mod",
            "model.module._orig_mod.teacher.backbone",
            "state_dict/model.teacher.module.backbone",
            "a/b/c/d",
            "models/wrapped_model._model",
        ],
    )
    def test_wrappers(self, official: Path, tmp_path: Path, wrap: str) -> None:
        """Dots are in names, strokes are dicts in dicts; beside it lies what trainers keep."""
        weights = torch.load(official, weights_only=True)
        *dicts, prefix = wrap.split("/")
        content: dict[str, Any] = {f"{prefix}.{name}": tensor for name, tensor in weights.items()}
        for name in reversed(dicts):
            content = {name: content}
        optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}
        kept = {"optimizer": optimizer, "args": Namespace(lr=1e-3), "epoch": 3, "best": np.float64(0.5)}
        torch.save(content | kept, tmp_path / "lvd1689m.pth")
        self.assert_same(official, tmp_path / "lvd1689m.pth", tmp_path)

    def test_nested_dicts(self, official: Path, tmp_path: Path) -> None:
        weights = torch.load(official, weights_only=True)
        torch.save({"teacher": {"backbone": weights, "dino_head": {"weight": torch.ones(3)}}}, tmp_path / "lvd1689m.pt")
        self.assert_same(official, tmp_path / "lvd1689m.pt", tmp_path)

    def test_a_module_with_two_names(self, official: Path, tmp_path: Path) -> None:
        """As DistributedDataParallel keeps beside the module itself; two modules are not one."""
        weights = torch.load(official, weights_only=True)
        torch.save({"model": weights, "module": {"model": weights}}, tmp_path / "lvd1689m.pth")
        self.assert_same(official, tmp_path / "lvd1689m.pth", tmp_path)
        other = {name: tensor + 1 for name, tensor in weights.items()}
        torch.save({"model": weights, "module": {"model": other}}, tmp_path / "lvd1689m.pth")
        with pytest.raises(CheckpointError, match=r"holds model\.cls_token more than once"):
            convert_checkpoint(tmp_path / "lvd1689m.pth", tmp_path / "model")

    def test_compiled_blocks(self, official: Path, tmp_path: Path) -> None:
        weights = torch.load(official, weights_only=True)
        renamed = {
            re.sub(r"^(blocks\.\d+)", r"\1._checkpoint_wrapped_module._orig_mod", k): v for k, v in weights.items()
        }
        torch.save({"model": renamed}, tmp_path / "lvd1689m.pth")
        self.assert_same(official, tmp_path / "lvd1689m.pth", tmp_path)

    def assert_same(self, official: Path, source: Path, tmp_path: Path) -> None:
        made = [convert_checkpoint(path, tmp_path / name).directory for path, name in ((official, "a"), (source, "b"))]
        assert fingerprint(DinoV3Config(made[0])) == fingerprint(DinoV3Config(made[1]))

    @pytest.fixture
    def several(self, tmp_path: Path) -> Callable[..., Path]:
        """A file with a backbone of each name, each with other weights."""

        def save(*prefixes: str) -> Path:
            content = {
                f"{prefix}.{name}": tensor + place
                for place, prefix in enumerate(prefixes)
                for name, tensor in random_vit(**PLAIN).items()
                if not name.startswith("rope") and not name.endswith("bias_mask")
            }
            torch.save(content, tmp_path / "several_lvd1689m.pth")
            return tmp_path / "several_lvd1689m.pth"

        return save

    @pytest.mark.parametrize(
        ("prefixes", "taken", "reason"),
        [
            (("student.backbone", "teacher.backbone"), 1, "teacher.backbone was taken (the teacher's)"),
            (("gram_teacher.backbone", "student.backbone", "teacher.backbone"), 2, "teacher.backbone was taken"),
            (("state_dict", "state_dict_ema"), 1, "state_dict_ema was taken (the averaged weights)"),
            (("student", "semantic"), 1, "semantic was taken (no student's"),
            (("teacher", "ema"), 0, "teacher was taken (the teacher's); --backbone takes ema"),
        ],
    )
    def test_which_of_several(
        self, several: Callable[..., Path], tmp_path: Path, prefixes: tuple[str, ...], taken: int, reason: str
    ) -> None:
        source = several(*prefixes)
        made = convert_checkpoint(source, tmp_path / "model")
        assert reason in made.notes[0]
        for place, prefix in ((taken, None), *enumerate(prefixes)):  # what the note says can be asked for
            made = convert_checkpoint(source, tmp_path / f"{place} {prefix}", backbone=prefix)
            found = load_file(made.directory / "model.safetensors")["norm.bias"]
            torch.testing.assert_close(found, random_vit(**PLAIN)["norm.bias"] + place)

    def test_a_student_alone_is_taken_and_called_so(self, several: Callable[..., Path], tmp_path: Path) -> None:
        made = convert_checkpoint(several("student.backbone"), tmp_path / "model")
        assert made.notes == ("the backbone is the student's (student.backbone); the file has no teacher's",)

    def test_it_is_asked_where_none_is_preferred(self, several: Callable[..., Path], tmp_path: Path) -> None:
        source = several("left", "right")
        with pytest.raises(CheckpointError, match=r"2 backbones \(left, right\).*backbone='left', --backbone left"):
            convert_checkpoint(source, tmp_path / "model")
        with pytest.raises(CheckpointError, match="has no backbone 'middle'; it has left, right"):
            convert_checkpoint(source, tmp_path / "model", backbone="middle")
        assert convert_checkpoint(source, tmp_path / "model", backbone="left").notes == ()


class TestHashes:
    """What one flipped byte does."""

    def flip(self, path: Path, place: float = 0.5) -> None:
        content = bytearray(path.read_bytes())
        content[int(len(content) * place)] ^= 1
        path.write_bytes(content)

    def test_in_a_name(self, official: Path, tmp_path: Path) -> None:
        convert_checkpoint(official, tmp_path / "sound")
        digits = official.stem[-8:]
        self.flip(official)
        message = rf"damaged or changed: the SHA-256 of the official file begins with {digits}.*take {digits} out of"
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(official, tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_a_changed_file_converts_under_another_name(self, official: Path, tmp_path: Path) -> None:
        """As the message says."""
        torch.save(random_vit(**SWIGLU), official)
        with pytest.raises(CheckpointError, match="damaged or changed"):
            convert_checkpoint(official, tmp_path / "model")
        convert_checkpoint(official.rename(tmp_path / "dinov3_tiny_pretrain_lvd1689m.pth"), tmp_path / "model")

    def test_a_copy_of_a_download_has_its_hash_too(self, official: Path, tmp_path: Path) -> None:
        copy = official.rename(tmp_path / f"{official.stem} (1).pth")
        convert_checkpoint(copy, tmp_path / "model")
        self.flip(copy)
        with pytest.raises(CheckpointError, match="damaged or changed"):
            convert_checkpoint(copy, tmp_path / "other")

    def test_other_names_with_eight_digits_promise_nothing(self, official: Path, tmp_path: Path) -> None:
        convert_checkpoint(official.rename(tmp_path / "run_lvd1689m-20260101.pth"), tmp_path / "model")

    @pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
    def test_without_a_hash_the_file_s_own_checksums_tell(self, official: Path, tmp_path: Path, place: float) -> None:
        source = official.rename(tmp_path / "lvd1689m.pth")
        self.flip(source, place)
        with pytest.raises(CheckpointError, match=r"is damaged: the bytes of .* in it do not have the checksum"):
            convert_checkpoint(source, tmp_path / "model")


class TestRefused:
    def refused(self, content: object, tmp_path: Path, message: str) -> None:
        torch.save(content, tmp_path / "wrong.pth")
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(tmp_path / "wrong.pth", tmp_path / "model")
        assert not (tmp_path / "model").exists()

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

    def test_a_directory_that_is_in_use(self, official: Path, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.txt").write_text("precious")
        with pytest.raises(CheckpointError, match="is in use already"):
            convert_checkpoint(official, tmp_path / "model")


def test_rope_periods_may_be_rounded_to_bfloat16(tmp_path: Path) -> None:
    """As in released files."""
    weights = random_vit(**PLAIN)
    weights["rope_embed.periods"] = weights["rope_embed.periods"].bfloat16()
    torch.save(weights, tmp_path / "lvd1689m.pth")
    made = convert_checkpoint(tmp_path / "lvd1689m.pth", tmp_path / "model")
    assert isinstance(made.architecture, ViTArchitecture)
    assert made.architecture == replace(made.architecture, num_heads=2, rope_theta=100.0)
