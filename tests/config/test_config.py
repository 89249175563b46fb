"""DinoV3Config: what it reads, what it settles, what it refuses."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from dinov3_ray import DinoV3Config
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.config.architecture import ViTArchitecture, heads_for
from dinov3_ray.config.preprocessing import misfit_of
from dinov3_ray.errors import CheckpointError, ConfigError

VIT = {
    "model_type": "dinov3_vit",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "use_gated_mlp": False,
    "num_register_tokens": 4,
    "patch_size": 16,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
}
SEED_CONFIG = {
    "architectures": ["Dinov3Model"],
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 16,
    "num_registers": 4,
}
# Word for word from the description that the project started from.
SEED_PREPROCESSOR = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": {"height": 518, "width": 518},
    "patch_size": 16,
    "num_register_tokens": 4,
}
STATISTICS = {key: SEED_PREPROCESSOR[key] for key in ("image_mean", "image_std")}


def model_dir(
    root: Path, config: dict[str, Any] | None = None, preprocessor: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """A directory without weights; ``changes`` go into preprocessor_config.json."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(VIT if config is None else config))
    values = {**(SEED_PREPROCESSOR if preprocessor is None else preprocessor), **changes}
    (root / "preprocessor_config.json").write_text(json.dumps(values))
    return root


def test_reads_both_files(tmp_path: Path) -> None:
    config = DinoV3Config(root=model_dir(tmp_path))
    assert (config.hidden_size, config.num_layers, config.patch_size, config.num_register_tokens) == (1024, 24, 16, 4)
    assert config.family == "vit"
    assert config.image_size == (518, 518)
    assert config.grid_size == (32, 32)  # 518 // 16: the rest is dropped
    assert config.preprocessing.size == (518, 518)
    assert config.preprocessing.rescale_factor == 1 / 255
    assert config.preprocessing.mean == (0.485, 0.456, 0.406)
    assert (config.dtype, config.compile, config.attention) == ("auto", "auto", "auto")


@pytest.mark.parametrize(("option", "size", "grid"), [(224, (224, 224), (14, 14)), ((256, 390), (256, 390), (16, 24))])
def test_image_size_option_overrides_the_file(tmp_path: Path, option: Any, size: Any, grid: Any) -> None:
    config = DinoV3Config(model_dir(tmp_path), image_size=option)
    assert config.image_size == config.preprocessing.size == size
    assert config.grid_size == grid


@pytest.mark.parametrize(
    ("size", "patch", "problem", "remedy"),
    [
        (
            (518, 518),
            16,
            "518 px is the size of DINOv2: 6 px at the right and 6 px below",
            "--image-size 512 .*32 x 32",
        ),
        ((224, 230), 16, "input of 224x230 px: 6 px at the right are dropped", r"--image-size 224 .*14 x 14"),
        (
            (390, 256),
            16,
            "input of 390x256 px: 6 px below are dropped",
            r"384x256 \(image_size=\(384, 256\)\).*24 x 16",
        ),
        ((240, 240), 32, "patches of 32 px do not divide .*: 16 px at the right", "--image-size 224 .*7 x 7"),
    ],
)
def test_what_is_wrong_with_a_size_that_the_patch_does_not_divide(
    size: tuple[int, int], patch: int, problem: str, remedy: str
) -> None:
    found = misfit_of(size, patch)
    assert found is not None
    assert re.search(problem, found.problem)
    assert re.search(remedy, found.remedy)


@pytest.mark.parametrize(("size", "patch"), [((512, 512), 16), ((224, 384), 16), ((518, 518), 14), ((224, 224), 32)])
def test_a_size_that_the_patch_divides_is_fine(size: tuple[int, int], patch: int) -> None:
    assert misfit_of(size, patch) is None


def test_is_a_frozen_value(tmp_path: Path) -> None:
    config = DinoV3Config(str(model_dir(tmp_path)), image_size=224, dtype="bfloat16")
    assert config == DinoV3Config(tmp_path, image_size=(224, 224), dtype="bfloat16")
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))
    assert pickle.loads(pickle.dumps(config)) == config
    assert replace(config, compile="reduce-overhead").image_size == (224, 224)
    assert replace(config, image_size=518) == DinoV3Config(tmp_path, dtype="bfloat16")
    assert DinoV3Config.of(config) is config
    assert DinoV3Config.of(str(tmp_path)) == DinoV3Config(tmp_path)
    with pytest.raises(FrozenInstanceError):
        config.dtype = "float32"  # type: ignore[misc]


def test_a_pickled_config_needs_no_files(tmp_path: Path) -> None:
    config = DinoV3Config(model_dir(tmp_path / "model"))
    pickled = pickle.dumps(config)
    (tmp_path / "model" / "config.json").unlink()
    assert pickle.loads(pickled).grid_size == (32, 32)


def test_a_relative_root_is_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir(tmp_path / "dinov3")
    monkeypatch.chdir(tmp_path)
    config = DinoV3Config(root=Path("dinov3"))
    assert config.root == tmp_path / "dinov3"
    assert str(tmp_path / "dinov3") in repr(config)


def test_the_seeds_spelling_is_completed_from_the_weights(tmp_path: Path) -> None:
    init_checkpoint("vit-test", tmp_path / "model")
    whole = DinoV3Config(tmp_path / "model", image_size=518)
    model_dir(tmp_path / "model", SEED_CONFIG)
    assert DinoV3Config(tmp_path / "model") == whole
    # Even the head count can go, by the rule that heads are of 64.
    model_dir(tmp_path / "model", {key: SEED_CONFIG[key] for key in ("architectures", "hidden_size")})
    assert DinoV3Config(tmp_path / "model") == whole


@pytest.mark.parametrize("variant", ["vit-test-gated", "convnext-test"])
def test_an_almost_empty_config_is_completed_from_the_weights(tmp_path: Path, variant: str) -> None:
    init_checkpoint(variant, tmp_path / "model")
    whole = DinoV3Config(tmp_path / "model")
    names = ["Dinov3ConvNextModel" if variant == "convnext-test" else "Dinov3Model"]
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architectures": names}))
    assert DinoV3Config(tmp_path / "model") == whole


def test_an_incomplete_config_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json lacks intermediate_size, use_gated_mlp.*found neither"):
        DinoV3Config(model_dir(tmp_path, SEED_CONFIG))


def test_an_incomplete_config_with_foreign_weights_is_refused(tmp_path: Path) -> None:
    init_checkpoint("convnext-test", tmp_path / "model")
    model_dir(tmp_path / "model", SEED_CONFIG)
    with pytest.raises(ConfigError, match="are not those of a DINOv3 vit"):
        DinoV3Config(tmp_path / "model")


@pytest.mark.parametrize(("hidden_size", "heads"), [(384, 6), (768, 12), (1024, 16), (1280, 20), (4096, 32)])
def test_the_head_rule_gives_the_published_counts(hidden_size: int, heads: int) -> None:
    assert heads_for(hidden_size) == heads


def test_convnext(tmp_path: Path) -> None:
    config = {"model_type": "dinov3_convnext", "hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}
    preprocessor = {**STATISTICS, "size": 224}
    cfg = DinoV3Config(model_dir(tmp_path, config, preprocessor))
    assert (cfg.family, cfg.hidden_size, cfg.num_layers, cfg.num_register_tokens) == ("convnext", 768, 4, 0)
    assert (cfg.patch_size, cfg.grid_size) == (32, (7, 7))
    assert cfg.architecture.layer_strides == (4, 8, 16, 32)


def test_patch_size_may_be_a_pair(tmp_path: Path) -> None:
    assert DinoV3Config(model_dir(tmp_path, {**VIT, "patch_size": [16, 16]})).patch_size == 16


class TestPreprocessing:
    @pytest.mark.parametrize(
        "size", [{"height": 256, "width": 320}, {"height": 256, "width": 320, "longest_edge": None}]
    )
    def test_exact(self, tmp_path: Path, size: dict[str, int]) -> None:
        rule = DinoV3Config(model_dir(tmp_path, size=size)).preprocessing
        assert (rule.size, rule.shortest_edge, rule.crop_size, rule.has_fixed_size) == ((256, 320), None, None, True)

    def test_integer(self, tmp_path: Path) -> None:
        assert DinoV3Config(model_dir(tmp_path, size=256)).preprocessing.size == (256, 256)
        rule = DinoV3Config(model_dir(tmp_path, size=256, default_to_square=False)).preprocessing
        assert (rule.size, rule.shortest_edge) == (None, 256)

    def test_shortest_edge_and_crop(self, tmp_path: Path) -> None:
        changes = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
        config = DinoV3Config(model_dir(tmp_path, **changes))
        rule = config.preprocessing
        assert (rule.size, rule.shortest_edge, rule.crop_size, rule.has_fixed_size) == (None, 256, (224, 224), True)
        assert config.image_size == (224, 224)
        larger = replace(config, image_size=448).preprocessing
        assert (larger.shortest_edge, larger.crop_size, larger.image_size) == (512, (448, 448), (448, 448))
        assert replace(config, image_size=224) == replace(config, compile="auto") == config

    def test_shortest_edge_alone(self, tmp_path: Path) -> None:
        config = DinoV3Config(model_dir(tmp_path, size={"shortest_edge": 256}))
        assert not config.preprocessing.has_fixed_size
        assert config.image_size == (256, 256)
        assert replace(config, compile=True).preprocessing == config.preprocessing
        assert replace(config, image_size=512).preprocessing.shortest_edge == 512
        oblong = replace(config, image_size=(256, 512)).preprocessing
        assert (oblong.size, oblong.shortest_edge) == ((256, 512), None)

    def test_steps_can_be_off(self, tmp_path: Path) -> None:
        off = {"do_resize": False, "do_rescale": False, "do_normalize": False}
        config = DinoV3Config(model_dir(tmp_path, **off))
        rule = config.preprocessing
        assert (rule.size, rule.shortest_edge, rule.has_fixed_size) == (None, None, False)
        assert (rule.rescale_factor, rule.mean, rule.std) == (1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        assert config.image_size == (518, 518)
        assert replace(config, image_size=224).preprocessing.size == (224, 224)

    def test_crop_that_is_switched_off_is_ignored(self, tmp_path: Path) -> None:
        changes = {"do_center_crop": None, "crop_size": {"height": 224, "width": 224}}
        assert DinoV3Config(model_dir(tmp_path, **changes)).preprocessing.crop_size is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.5, float("nan"), 0.5]}, r"image_mean must be three finite numbers.*nan"),
        ({"image_std": [0.2, float("inf"), 0.2]}, r"image_std must be three finite numbers.*inf"),
        ({"image_std": [0.2, 0, 0.2]}, r"image_std must be positive.*\[0\.2, 0, 0\.2\]"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean must be three finite numbers.*\[0\.5, 0\.5\]"),
        ({"image_mean": None}, r"image_mean must be three finite numbers.*None"),
        ({"image_std": 0.5}, r"image_std must be three finite numbers.*0\.5"),
        ({"size": None}, "size must be given"),
        ({"size": {"height": 518}}, r"size must be an integer, or an object.*'height': 518"),
        ({"size": {"longest_edge": 518}}, r"size must be .*'longest_edge': 518"),
        ({"size": 0}, "size must be .*; got 0"),
        ({"size": True}, "size must be .*; got True"),
        ({"do_center_crop": True}, "crop_size must be given where do_center_crop is true"),
        ({"do_center_crop": True, "crop_size": 600}, r"crop_size must fit into the resized image \[518, 518\]"),
        ({"do_resize": "no"}, "do_resize must be true or false; got 'no'"),
        ({"do_pad": True}, "do_pad must be false"),
        ({"resample": 3}, r"resample must be 2 \(bilinear\); got 3"),
        ({"rescale_factor": 0}, "rescale_factor must be a positive finite number; got 0"),
        ({"patch_size": 14}, r"patch_size must equal config\.json's \(16\); got 14"),
        ({"num_register_tokens": 0}, r"num_register_tokens must equal config\.json's \(4\); got 0"),
        ({"size": 15}, r"image_size must be at least one patch \(16 px\) high and wide; got \[15, 15\]"),
    ],
)
def test_wrong_preprocessor_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DinoV3Config(model_dir(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dinov2"}, "model_type must be dinov3_vit or dinov3_convnext; got 'dinov2'"),
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1; got 0"),
        ({"hidden_size": 10.5}, "hidden_size must be an integer >= 1; got 10.5"),
        ({"num_hidden_layers": "24"}, "num_hidden_layers must be an integer >= 1; got '24'"),
        ({"num_attention_heads": 7}, r"num_attention_heads must divide hidden_size \(1024\).*got 7"),
        ({"num_registers": 5}, r"num_registers must equal num_register_tokens \(4\); got 5"),
        ({"num_channels": 1}, r"num_channels must be 3 \(RGB\); got 1"),
        ({"patch_size": [16, 14]}, r"patch_size must be one integer, or two equal ones; got \[16, 14\]"),
        ({"use_gated_mlp": "yes"}, "use_gated_mlp must be true or false; got 'yes'"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a positive finite number; got nan"),
        ({"hidden_act": 3}, "hidden_act must be a non-empty string; got 3"),
    ],
)
def test_wrong_config_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DinoV3Config(model_dir(tmp_path, {**VIT, **changes}))


def test_all_complaints_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 problems:.*image_mean.*image_std.*patch_size") as caught:
        DinoV3Config(model_dir(tmp_path, image_mean=None, image_std=None, patch_size=8))
    assert str(tmp_path / "preprocessor_config.json") in str(caught.value)


def test_all_problems_of_config_json_come_at_once_in_the_order_of_the_fields(tmp_path: Path) -> None:
    changes = {"hidden_size": "1024", "num_attention_heads": True, "mlp_bias": 1, "layer_norm_eps": "1e-5"}
    root = model_dir(tmp_path, {**VIT, **changes, "num_registers": 5})
    with pytest.raises(ConfigError) as caught:
        DinoV3Config(root)
    assert str(caught.value) == (
        f"{root / 'config.json'} has 5 problems:\n"
        "  - hidden_size must be an integer >= 1; got '1024'\n"
        "  - num_attention_heads must be an integer >= 1; got True\n"
        "  - num_registers must equal num_register_tokens (4); got 5\n"
        "  - layer_norm_eps must be a positive finite number; got '1e-5'\n"
        "  - mlp_bias must be true or false; got 1"
    )


def test_all_wrong_options_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 problems:.*dtype must be.*image_size must be.*compile must be auto"):
        DinoV3Config(model_dir(tmp_path), dtype="fp8", image_size="224", compile="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"do_pad": 0},
        {"do_resize": 1},
        {"do_normalize": "false"},
        {"size": "224"},
        {"size": {"height": 224, "width": True}},
        {"image_mean": ["0.5", 0.5, 0.5]},
        {"image_std": [True, True, True]},
        {"rescale_factor": "0.1"},
        {"patch_size": "16"},
    ],
)
def test_nothing_is_converted_silently(tmp_path: Path, changes: dict[str, Any]) -> None:
    (key,) = changes
    with pytest.raises(ConfigError, match=rf"{key} must be .*; got"):
        DinoV3Config(model_dir(tmp_path, **changes))


def test_what_a_step_that_is_off_would_need_is_not_looked_at(tmp_path: Path) -> None:
    off = {"do_rescale": False, "do_normalize": False, "do_center_crop": False}
    wrong = {"rescale_factor": 0, "image_mean": "x", "image_std": [0], "crop_size": -1}
    assert DinoV3Config(model_dir(tmp_path, **off, **wrong)).preprocessing.rescale_factor == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "dtype must be one of auto, float32, bfloat16, float16, float8; got 'fp8'"),
        ({"image_size": 0}, "image_size must be None, an integer >= 1, a pair"),
        ({"image_size": (224,)}, "image_size must be None, an integer >= 1, a pair"),
        ({"image_size": 224.0}, r"image_size must be .*got 224\.0"),
        ({"image_size": 8}, "image_size must be at least one patch"),
        (
            {"compile": 1},
            r"compile must be auto, True, False or a mode of torch\.compile \(default, reduce-overhead.*got 1",
        ),
        ({"compile": "fast"}, r"compile must be auto, True, False or a mode .*got 'fast'"),
        ({"attention": ""}, "attention must be the name of an implementation"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DinoV3Config(model_dir(tmp_path), **options)


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="image_sise"):
        DinoV3Config(model_dir(tmp_path), image_sise=224)  # type: ignore[call-arg]


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"root must be a model directory.* is missing"):
        DinoV3Config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"root must be the path of a model directory, or the id .*; got 3"):
        DinoV3Config(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is a file"):
        DinoV3Config(model_dir(tmp_path) / "config.json")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is missing.*cannot be guessed"):
        DinoV3Config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        DinoV3Config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object; got a list"):
        DinoV3Config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        DinoV3Config(tmp_path)


def test_hidden_act_default_follows_the_writer(tmp_path: Path) -> None:
    """Where transformers wrote the file, its class default holds; elsewhere a gated MLP is SwiGLU."""
    gated = {**VIT, "use_gated_mlp": True}
    by_transformers = DinoV3Config(model_dir(tmp_path, gated)).architecture
    by_others = DinoV3Config(
        model_dir(tmp_path, {key: value for key, value in gated.items() if key != "model_type"})
    ).architecture
    assert isinstance(by_transformers, ViTArchitecture)
    assert isinstance(by_others, ViTArchitecture)
    assert (by_transformers.hidden_act, by_others.hidden_act) == ("gelu", "silu")
