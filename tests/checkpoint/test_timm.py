"""timm's layout: loaded as it is and converted, against what timm computed (``tests/support/record_timm.py``)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import run_command as run
from file_changes import change_json, change_weights
from paths import SUPPORT
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov3_ray import DinoV3Config, DinoV3Teacher
from dinov3_ray.checkpoint import convert_checkpoint, fingerprint, load_model, verify
from dinov3_ray.config.license import stated_license
from dinov3_ray.config.variants import STATISTICS
from dinov3_ray.errors import CheckpointError, ConfigError

RECORDED = SUPPORT / "timm_models"
SMALL_PLUS = "vit_small_plus_patch16_dinov3.lvd1689m"
SATELLITE = "vit_large_patch16_dinov3_qkvb.sat493m"
CONVNEXT = "convnext_tiny.dinov3_lvd1689m"
NAMES = (SMALL_PLUS, SATELLITE, CONVNEXT)


def error_of(root: Path, recorded: str) -> float:
    """The largest difference between the tokens of ``root`` and those that timm computed."""
    expected = load_file(RECORDED / recorded / "expected.safetensors")
    with torch.no_grad():
        return (load_model(DinoV3Config(root))(expected["images"] / 255) - expected["tokens"]).abs().max().item()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    """A copy of a recorded model, as timm's folder on the hub."""
    return Path(shutil.copytree(RECORDED / name, tmp_path / name, ignore=lambda *_: ["expected.safetensors"]))


class TestAgainstTimm:
    def test_loaded_as_it_is(self, folder: Path, name: str) -> None:
        assert error_of(folder, name) < 1e-5

    def test_converted(self, folder: Path, name: str, tmp_path: Path) -> None:
        made = convert_checkpoint(folder, tmp_path / "model")
        assert error_of(made.directory, name) < 1e-5
        converted, direct = DinoV3Config(made.directory), DinoV3Config(folder)
        assert (converted.architecture, converted.preprocessing) == (direct.architecture, direct.preprocessing)
        assert fingerprint(converted) == fingerprint(direct)

    def test_the_file_alone(self, folder: Path, name: str, tmp_path: Path) -> None:
        """Named as on GitHub, or as trainers of timm save it."""
        weights = load_file(folder / "model.safetensors")
        save_file(weights, tmp_path / "lvd1689m.safetensors")
        torch.save({"state_dict": weights, "arch": name, "epoch": 3}, tmp_path / "lvd1689m.pth.tar")
        for source in ("lvd1689m.safetensors", "lvd1689m.pth.tar"):
            if name.startswith("vit"):  # of width 64 and two heads of 32, which nothing in the file says
                with pytest.raises(CheckpointError, match=r"number of heads of its hidden size 64.*put it in a folder"):
                    convert_checkpoint(tmp_path / source, tmp_path / "refused")
                continue
            made = convert_checkpoint(tmp_path / source, tmp_path / f"model of {source}")
            found = load_file(made.directory / "model.safetensors")
            expected = load_file(convert_checkpoint(folder, tmp_path / f"a {source}").directory / "model.safetensors")
            assert all(torch.equal(found[key], expected[key]) for key in expected.keys() | found.keys())

    @pytest.mark.parametrize("part", ["gamma", "q_bias", "norm", "reg_token", "v_bias", "fc1"])
    def test_the_record_notices_each_part(self, tmp_path: Path, part: str) -> None:
        folder = Path(shutil.copytree(RECORDED / SATELLITE, tmp_path / "spoilt"))
        change_weights(folder, lambda weights: [weights[key].mul_(1.01) for key in weights if part in key])
        assert error_of(folder, SATELLITE) > 1e-4


class TestWhatItSays:
    def test_images_are_prepared_as_pretrained_cfg_says(self) -> None:
        for name, statistics in ((SATELLITE, "sat493m"), (SMALL_PLUS, "lvd1689m")):
            config = DinoV3Config(RECORDED / name)
            rule = config.preprocessing
            assert (rule.mean, rule.std) == STATISTICS[statistics]
            assert (config.image_size, rule.rescale_factor, rule.crop_size) == ((256, 256), 1 / 255, None)
        assert DinoV3Config(RECORDED / SATELLITE, image_size=128).image_size == (128, 128)

    def test_heads_are_those_of_model_args(self) -> None:
        architecture = DinoV3Config(RECORDED / SATELLITE).architecture
        assert architecture.num_heads == 2  # type: ignore[union-attr]

    def test_statistics_and_size_can_be_chosen(self, tmp_path: Path) -> None:
        made = convert_checkpoint(RECORDED / SATELLITE, tmp_path / "a", statistics="lvd1689m", image_size=64)
        config = DinoV3Config(made.directory)
        assert (made.statistics, config.image_size) == ("lvd1689m", (64, 64))
        assert config.preprocessing.mean == STATISTICS["lvd1689m"][0]
        assert convert_checkpoint(RECORDED / SATELLITE, tmp_path / "b").statistics == "sat493m"

    def test_statistics_of_its_own(self, folder: Path, tmp_path: Path) -> None:
        change_json(folder / "config.json", lambda values: values["pretrained_cfg"].update(mean=[0.5, 0.5, 0.5]))
        made = convert_checkpoint(folder, tmp_path / "model")
        assert (made.statistics, DinoV3Config(made.directory).preprocessing.mean) == ("own", (0.5, 0.5, 0.5))

    def test_its_licence_goes_with_it(self, tmp_path: Path) -> None:
        assert stated_license(RECORDED / SATELLITE) == "dinov3-license"
        assert (
            stated_license(convert_checkpoint(RECORDED / SATELLITE, tmp_path / "model").directory) == "dinov3-license"
        )

    def test_a_preprocessor_config_beside_it_is_read(self, folder: Path, tmp_path: Path) -> None:
        made = convert_checkpoint(folder, tmp_path / "model", image_size=96)
        shutil.copy(made.directory / "preprocessor_config.json", folder)
        assert DinoV3Config(folder).image_size == (96, 96)

    def test_teacher_and_commands_take_it(self, folder: Path, tmp_path: Path) -> None:
        teacher = DinoV3Teacher(folder, "cpu")
        assert teacher.extract_feature_map(torch.rand(1, 3, 64, 64)).shape[:2] == (1, teacher.config.hidden_size)
        checked = run("checkpoint", "verify", folder)
        assert (checked.exit_code, "sound" in checked.output) == (0, True), checked.output
        assert fingerprint(teacher.config) in run("checkpoint", "info", folder).output
        made = run("checkpoint", "convert", folder, tmp_path / "model")
        assert (made.exit_code, made.stdout.startswith(f"{tmp_path / 'model'}: ")) == (0, True), made.output


class TestRefused:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return Path(shutil.copytree(RECORDED / SATELLITE, tmp_path / "folder"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.update(architecture="vit_base_patch16_224"), r"must be one of timm's DINOv3 models"),
            (lambda v: v.update(architecture="convnext_xxlarge"), r"got 'convnext_xxlarge'"),
            (lambda v: v["model_args"].update(rope_temperature=10.0), r"must not change what .*rope_temperature=10\.0"),
            (lambda v: v["model_args"].update(num_heads=3), r"num_heads must divide the hidden size 64; got 3"),
            (lambda v: v["pretrained_cfg"].update(mean=[1]), r"pretrained_cfg\.mean must be three numbers"),
            (lambda v: v["pretrained_cfg"].pop("input_size"), r"pretrained_cfg\.input_size"),
            (
                lambda v: v["pretrained_cfg"].update(input_size=[1, 256, 256]),
                r"input_size must be \[3, height, width\]",
            ),
        ],
    )
    def test_config(
        self, folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
    ) -> None:
        change_json(folder / "config.json", change)
        with pytest.raises(ConfigError, match=message):
            DinoV3Config(folder)
        with pytest.raises(ConfigError, match=message):
            convert_checkpoint(folder, tmp_path / "model")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda w: w.update({"fc_norm.weight": torch.ones(64)}),
                r"no published DINOv3 has: fc_norm\.weight \[64\]",
            ),
            (lambda w: w.update({"blocks.0.attn.qkv.weight": torch.ones(64, 64)}), "must stack three matrices"),
        ],
    )
    def test_weights(
        self, folder: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        change_weights(folder, change)
        with pytest.raises(CheckpointError, match=message):
            DinoV3Config(folder)
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(folder, tmp_path / "model")

    def test_a_number_of_heads_that_nothing_says(self, tmp_path: Path) -> None:
        """Published widths have heads of 64; of others a file alone does not say it, and the folder does."""
        width, folder = 48, Path(shutil.copytree(RECORDED / SATELLITE, tmp_path / "narrow"))
        weights = load_file(folder / "model.safetensors")
        for key, tensor in weights.items():
            rows = 3 * width if "qkv" in key else width if tensor.shape[:1] == (64,) else None
            columns = slice(width if tensor.shape[-1] == 64 else None)
            weights[key] = tensor[:rows, ..., columns].contiguous() if tensor.ndim > 1 else tensor[:rows].contiguous()
        save_file(weights, folder / "model.safetensors")
        change_json(folder / "config.json", lambda values: values["model_args"].update(embed_dim=width, num_heads=3))
        made = convert_checkpoint(folder, tmp_path / "model")
        assert made.architecture.num_heads == 3  # type: ignore[union-attr]
        change_json(folder / "config.json", lambda values: values["model_args"].pop("num_heads"))
        with pytest.raises(ConfigError, match="num_heads must divide the hidden size 48; got None"):
            DinoV3Config(folder)
        alone = Path(shutil.copy(folder / "model.safetensors", tmp_path / "lvd1689m.safetensors"))
        with pytest.raises(CheckpointError, match="does not say the number of heads of its hidden size 48, which"):
            convert_checkpoint(alone, tmp_path / "other")

    def test_a_missing_tensor(self, folder: Path) -> None:
        change_weights(folder, lambda weights: weights.pop("blocks.0.mlp.fc2.bias"))
        with pytest.raises(CheckpointError, match=r"layer\.0\.mlp\.down_proj\.bias is missing"):
            verify(DinoV3Config(folder))
