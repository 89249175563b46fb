"""Teachers of any vision model of transformers, held against transformers itself, bit for bit."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_backend import Backend
from file_changes import change_json, change_weights
from torch import Tensor
from transformers_models import KINDS, SIGLIP, last_hidden_state, transformers_model, write_transformers

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, TeacherPool
from dinov3_ray.checkpoint import fingerprint, verify
from dinov3_ray.config import TransformersConfig, open_config
from dinov3_ray.errors import CheckpointError, ConfigError, SpecError
from dinov3_ray.images import ImageBatch
from dinov3_ray.model import TransformersTeacher, open_teacher
from dinov3_ray.model.preprocess import preprocess
from dinov3_ray.pool.spec import check_teacher

Directory = Callable[[str], Path]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """The directory of a kind of model, written once; not to be changed."""
    folder = tmp_path_factory.mktemp("transformers")

    def of(kind: str) -> Path:
        path = folder / kind
        return path if path.exists() else write_transformers(path, *KINDS[kind])

    return of


@pytest.fixture
def copy(directory: Directory, tmp_path: Path) -> Directory:
    """A directory that a test may change."""
    return lambda kind: Path(shutil.copytree(directory(kind), tmp_path / kind))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 70, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pixels_of(teacher: Any, images: Tensor) -> Tensor:
    return preprocess(ImageBatch.of(images), teacher.preprocessing, torch.device("cpu"))


def as_tokens(map_BDhw: Tensor | None) -> Tensor:
    assert map_BDhw is not None
    return map_BDhw.flatten(2).transpose(1, 2)


# What each kind has before its patches: whether a CLS token, how many registers, and how many tokens in all.
PREFIX = {
    "dinov2": (True, 0, 1),
    "dinov2_with_registers": (True, 4, 5),
    "siglip2": (False, 0, 0),
    "clip": (True, 0, 1),
    "vit": (True, 0, 1),
    "deit": (True, 0, 2),  # the second is for distillation
}


@pytest.mark.parametrize("image_size", [None, 112, (112, 70)])
@pytest.mark.parametrize("kind", PREFIX)
def test_every_output_is_transformers_own_bit_for_bit(
    directory: Directory, images: Tensor, kind: str, image_size: int | tuple[int, int] | None
) -> None:
    teacher = TransformersTeacher(directory(kind), dtype="float32", image_size=image_size)
    has_cls, registers, prefix = PREFIX[kind]
    assert (teacher.has_cls, teacher.num_register_tokens) == (has_cls, registers)
    given = teacher.extract(images, FeatureSpec(has_cls, True, registers > 0, layers=(0, -1), norm=False))
    model = transformers_model(directory(kind))
    tokens, after_blocks = last_hidden_state(model, pixels_of(teacher, images))
    assert torch.equal(as_tokens(given.feature_map), tokens[:, prefix:])
    assert given.feature_map is not None
    assert given.feature_map.shape[2:] == teacher.grid_size
    assert given.cls is None if not has_cls else torch.equal(given.cls, tokens[:, 0])  # type: ignore[arg-type]
    assert given.registers is None if not registers else torch.equal(given.registers, tokens[:, 1:prefix])  # type: ignore[arg-type]
    assert torch.equal(as_tokens(given.layers[0]), after_blocks[0][:, prefix:])
    assert torch.equal(as_tokens(given.layers[-1]), after_blocks[-1][:, prefix:])


@pytest.mark.parametrize(("kind", "norm"), [("dinov2", "layernorm"), ("siglip2", "post_layernorm"), ("clip", None)])
def test_layers_go_through_the_final_norm_if_the_last_hidden_state_does(
    directory: Directory, images: Tensor, kind: str, norm: str | None
) -> None:
    teacher = TransformersTeacher(directory(kind), dtype="float32")
    given = teacher.extract(images, FeatureSpec(feature_map=True, layers=(1, 2)))
    model, prefix = transformers_model(directory(kind)), PREFIX[kind][2]
    middle = last_hidden_state(model, pixels_of(teacher, images))[1][1]
    inner = getattr(model, "vision_model", model)  # as before transformers 5
    expected = middle if norm is None else getattr(inner, norm)(middle)
    assert torch.equal(as_tokens(given.layers[1]), expected[:, prefix:])
    assert torch.equal(given.layers[2], given.feature_map)  # type: ignore[arg-type]


def test_it_computes_as_transformers_does_in_bfloat16(directory: Directory, images: Tensor) -> None:
    teacher = TransformersTeacher(directory("siglip2"), dtype=torch.bfloat16)
    model = transformers_model(directory("siglip2")).to(torch.bfloat16)
    tokens, _ = last_hidden_state(model, pixels_of(teacher, images))
    assert torch.equal(as_tokens(teacher.extract(images, FeatureSpec(feature_map=True)).feature_map), tokens)
    assert teacher.prove() > 0.999


def test_it_finds_out_which_kind_a_directory_holds(directory: Directory, tiny_checkpoint: Path) -> None:
    assert isinstance(open_config(tiny_checkpoint), DinoV3Config)
    assert isinstance(open_teacher(tiny_checkpoint), DinoV3Teacher)
    assert isinstance(open_config(directory("dinov2")), TransformersConfig)
    assert isinstance(open_teacher(directory("dinov2")), TransformersTeacher)
    with pytest.raises(
        ConfigError,
        match=r"model_type must be dinov3_vit or dinov3_convnext; got 'dinov2' \(for .* TransformersTeacher",
    ):
        DinoV3Teacher(directory("dinov2"))
    with pytest.raises(ConfigError, match=r"model_type must be of another model than 'dinov3_vit', which DinoV3Config"):
        TransformersTeacher(tiny_checkpoint)


def test_what_a_model_lacks_is_refused_before_anything_is_computed(directory: Directory, images: Tensor) -> None:
    teacher = TransformersTeacher(directory("siglip2"), dtype="float32")
    with pytest.raises(SpecError, match=r"FeatureSpec\.cls must be False for this model: it has no CLS token"):
        teacher.extract_features(images)
    with pytest.raises(SpecError, match=r"FeatureSpec\.registers must be False for this model: it has 0"):
        teacher.extract(images, FeatureSpec(registers=True))
    with pytest.raises(SpecError, match=r"FeatureSpec\.layers must lie in -3\.\.2"):
        teacher.extract(images, FeatureSpec(layers=(3,)))
    with TeacherPool.start(directory("siglip2"), replicas=1, local_mode=True) as pool:
        with pytest.raises(SpecError, match=r"FeatureSpec\.cls: this pool's teacher has no CLS token"):
            pool.teacher().extract_features(images)
        assert pool.teacher().extract_feature_map(images).shape == (3, 32, 4, 4)


# Wrong directories ----------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(next(key for key in tensors if name in key))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dinov2", without("cls_token"), r"embeddings\.cls_token is missing"),
        ("siglip2", without("vision_model.encoder.layers.2"), r"encoder\.layers\.2\S+ is missing"),
        ("dinov2", without("layernorm.weight"), r"layernorm\.weight is missing"),
        ("dinov2", lambda tensors: tensors.update(surplus=torch.ones(3)), r"surplus is unexpected"),
        ("siglip2", lambda tensors: tensors.update(adapter=torch.ones(3)), r"adapter is unexpected"),
        (
            "vit",
            lambda tensors: tensors.update({"vit.encoder.layer.3.layernorm_before.bias": torch.ones(32)}),
            r"3\.layernorm_before\.bias is unexpected",
        ),
        (
            "dinov2",
            lambda tensors: tensors.update({"embeddings.cls_token": torch.full((1, 1, 32), torch.nan)}),
            r"tensor embeddings\.cls_token must be finite; found 32 NaN or infinite values of 32",
        ),
        (
            "dinov2",
            lambda tensors: tensors.update({"layernorm.bias": torch.ones(31)}),
            r"not what its configuration describes:\n  - layernorm\.bias: expected \[32\], found \[31\]$",
        ),
    ],
    ids=["no CLS", "no last block", "no norm", "surplus", "surplus beside two towers", "surplus block", "NaN", "shape"],
)
def test_weights_that_are_not_the_models_are_refused(
    copy: Directory, kind: str, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    root = copy(kind)
    change_weights(root, change)
    with pytest.raises(CheckpointError, match=message):
        TransformersTeacher(root)


def test_weights_that_are_not_there_or_not_whole_are_refused(copy: Directory) -> None:
    root = copy("dinov2")
    weights = root / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    for use in (TransformersTeacher, lambda root: verify(open_config(root))):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
            use(root)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors"):
        TransformersTeacher(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nobody_knows"}, r"model_type must be one that the installed transformers knows; got 'nobody"),
        (
            {"model_type": "nobody_knows", "auto_map": {"AutoModel": "modeling.Evil"}},
            r"its auto_map names code of the model's own, which is never run here",
        ),
        ({"model_type": "bert"}, r"must be a vision model .* model_type 'bert', whose configuration has no patch_size"),
        ({"model_type": "siglip2_vision_model"}, r"has no image_size; siglip2 is NaFlex"),
        ({"patch_size": [14, 7]}, r"patch_size must be one integer, or two equal ones; got \[14, 7\]"),
        ({"num_channels": 4}, r"num_channels must be 3 \(RGB\); got 4"),
        ({"hidden_size": "wide"}, r"config\.json"),
    ],
)
def test_a_config_that_is_not_such_a_models_is_refused(
    copy: Directory, changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = copy("dinov2")
    change_json(root / "config.json", **changes)
    (root / "modeling.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the answer to transformers' question whether to run it
    with pytest.raises(ConfigError, match=message):
        open_config(root)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, r"image_processor_type must be one whose arithmetic is"),
        ({"resample": 0}, r"resample must be 2 \(bilinear\) or 3 \(bicubic\); got 0"),
        ({"size": None}, r"size must be given"),
        ({"image_mean": None}, r"image_mean must be three finite numbers"),
        ({"do_pad": True}, r"do_pad must be false"),
        ({"size": {"shortest_edge": 64, "longest_edge": 80}}, r"size must be an integer, or an object of"),
    ],
)
def test_a_processor_of_another_arithmetic_is_refused(
    copy: Directory, changes: dict[str, object], message: str
) -> None:
    root = copy("dinov2")
    change_json(root / "preprocessor_config.json", **changes)
    with pytest.raises(ConfigError, match=message):
        open_config(root)


def test_the_processors_file_must_be_there_alone_or_in_that_of_both_towers(copy: Directory) -> None:
    root = copy("siglip2")
    expected = open_config(root)
    (root / "preprocessor_config.json").rename(root / "kept")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is missing: copy it from the model's release"):
        open_config(root)
    nested = {"image_processor": json.loads((root / "kept").read_text()), "processor_class": "SiglipProcessor"}
    (root / "processor_config.json").write_text(json.dumps(nested))
    assert open_config(root).preprocessing == expected.preprocessing


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        (
            "SwinModel",
            {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 64, "window_size": 4},
            r"must be a Vision Transformer: embeddings, blocks, and at most a norm; got swin, and",
        ),
        (
            "ViTMAEModel",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16},
            r"its first block gets \[2, 5, 32\] for 2 images, which are not 4 x 4 patches row by row",
        ),
    ],
)
def test_a_model_whose_tokens_are_not_patches_is_refused(
    tmp_path: Path, architecture: str, config: dict[str, Any], message: str
) -> None:
    root = write_transformers(tmp_path / "model", architecture, config, SIGLIP | {"size": {"height": 64, "width": 64}})
    with pytest.raises(ConfigError, match=message):
        TransformersTeacher(root)


def test_a_size_that_the_model_cannot_compute_is_refused(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a model without a way to resize its positions; all that are tested here have one.
    from transformers import SiglipVisionModel

    def forward(self: Any, pixel_values: Tensor) -> Any:
        return type(self).whole(self, pixel_values)

    monkeypatch.setattr(SiglipVisionModel, "whole", SiglipVisionModel.forward, raising=False)
    monkeypatch.setattr(SiglipVisionModel, "forward", forward)
    assert TransformersTeacher(directory("siglip2")).grid_size == (4, 4)
    with pytest.raises(ConfigError, match=r"image_size must be one that the model can compute \(its own is 64x64\)"):
        TransformersTeacher(directory("siglip2"), image_size=(64, 80))


def test_counters_in_the_weights_file_are_left_alone(copy: Directory, images: Tensor) -> None:
    root = copy("clip")
    before = TransformersTeacher(root, dtype="float32").extract_features(images)
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(17)[None] for tower in ("vision", "text")}
    change_weights(root, lambda tensors: tensors.update(ids))
    assert torch.equal(TransformersTeacher(root, dtype="float32").extract_features(images), before)


def test_a_head_that_is_not_used_need_not_be_there(copy: Directory, images: Tensor) -> None:
    root = copy("siglip2")
    before = TransformersTeacher(root, dtype="float32").extract_feature_map(images)
    change_weights(root, without("vision_model.head.probe"))
    assert torch.equal(TransformersTeacher(root, dtype="float32").extract_feature_map(images), before)


# As a DinoV3Teacher ---------------------------------------------------------------------------------------------------


def test_it_is_frozen_and_sealed(directory: Directory, images: Tensor) -> None:
    teacher = TransformersTeacher(directory("dinov2"), dtype="float32")
    before = teacher.extract_features(images)
    teacher.model.train()
    assert torch.equal(teacher.extract_features(images), before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    copied = pickle.loads(pickle.dumps(teacher))
    assert len(pickle.dumps(teacher)) < 5_000
    with torch.no_grad():
        next(teacher.model.blocks.parameters()).mul_(2)
    with pytest.raises(CheckpointError, match=r"was changed since it was loaded"):
        teacher.extract_features(images)
    assert torch.equal(copied.extract_features(images), before)


@pytest.mark.slow
def test_options_are_a_dinov3s(directory: Directory, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    root = directory("dinov2_with_registers")
    plain = TransformersTeacher(root, dtype="float32").extract_features(images)
    eager = TransformersTeacher(root, dtype="float32", attention="eager")
    assert eager.prove() > 0.9999
    torch.testing.assert_close(eager.extract_features(images), plain, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"attention 'nonsense' cannot be used"):
        TransformersTeacher(root, attention="nonsense")
    with pytest.raises(ConfigError, match=r"dtype must be one of auto, float32"):
        TransformersTeacher(root, dtype=torch.float64)
    backend = Backend.in_place_of_inductor(monkeypatch)
    compiled = TransformersTeacher(root, dtype="float32", compile=True)
    assert compiled.compiled
    assert backend.graphs
    torch.testing.assert_close(compiled.extract_features(images), plain, atol=1e-4, rtol=1e-4)


def test_loading_leaves_the_processes_settings_alone(directory: Directory) -> None:
    from transformers.utils import logging

    torch.manual_seed(3)
    state, verbosity, bar = torch.get_rng_state(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    TransformersTeacher(directory("vit"), dtype="bfloat16")  # whose pooler is drawn at random before it is dropped
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_default_dtype(), logging.get_verbosity()) == (torch.float32, verbosity)
    assert logging.is_progress_bar_enabled() == bar


def test_the_fingerprint_is_that_of_the_model_and_not_of_its_spelling(copy: Directory) -> None:
    root = copy("siglip2")
    before = fingerprint(open_config(root))
    spelling = {"num_channels": 3, "layer_norm_eps": 1e-6, "attention_dropout": 0.0, "dtype": "float16"}
    change_json(root / "config.json", lambda values: values["vision_config"].update(spelling))
    change_json(root / "config.json", transformers_version="4.57.0")
    assert fingerprint(open_config(root)) == before
    assert fingerprint(open_config(root, image_size=80)) != before
    change_json(root / "preprocessor_config.json", resample=3)
    assert fingerprint(open_config(root)) != before
    change_json(root / "preprocessor_config.json", resample=2)
    change_json(root / "config.json", lambda values: values["vision_config"].update(layer_norm_eps=1e-5))
    assert fingerprint(open_config(root)) != before
    change_json(root / "config.json", lambda values: values["vision_config"].update(layer_norm_eps=1e-6))
    change_weights(root, lambda tensors: tensors["vision_model.embeddings.patch_embedding.bias"].add_(1))
    assert fingerprint(open_config(root)) != before


# In pools -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["directory", "config", "factory", "factory with a device"])
def given(request: pytest.FixtureRequest, directory: Directory) -> Any:
    root = directory("dinov2_with_registers")
    return {
        "directory": lambda: root,
        "config": lambda: TransformersConfig(root, dtype="float32"),
        "factory": lambda: TransformersTeacher.factory(root, dtype="float32"),
        "factory with a device": lambda: TransformersTeacher.factory(root, device="cpu", dtype=torch.float32),
    }[request.param]()


@pytest.mark.slow
def test_a_pool_takes_it_in_any_form(given: Any, directory: Directory, images: Tensor) -> None:
    local = TransformersTeacher(directory("dinov2_with_registers"), dtype="float32")
    spec = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0, -1))
    with TeacherPool.start(pickle.loads(pickle.dumps(given)), replicas=2, local_mode=True) as pool:
        remote = pool.teacher()
        assert remote.fingerprint == local.fingerprint
        assert remote.preprocessing == local.preprocessing
        if remote.dtype == torch.float32:  # auto is what the CPU is good at
            mine, theirs = (dict(teacher.extract(images, spec).named()) for teacher in (local, remote))
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_factory_makes_teachers(directory: Directory, images: Tensor) -> None:
    config = TransformersConfig(directory("clip"), dtype="bfloat16")
    factory = TransformersTeacher.factory(config, dtype="float32", image_size=80)
    assert pickle.loads(pickle.dumps(factory)) == factory
    teacher = factory()
    assert (teacher.grid_size, teacher.dtype) == ((5, 5), torch.float32)
    assert check_teacher(factory) == teacher.config  # so that the pool chooses the device, and checks the files
    chosen = TransformersTeacher.factory(config, device="cpu")
    assert check_teacher(chosen) is chosen
    with pytest.raises(ConfigError, match=r"is missing"):
        TransformersTeacher.factory(directory("clip") / "nowhere")
    with pytest.raises(ConfigError, match=r"device must be a torch device such as 'cpu' or 'cuda:0'; got 'gpu'"):
        TransformersTeacher.factory(config, device="gpu")
    assert TransformersTeacher.factory(config, device="cuda:7").device == "cuda:7"  # which a replica may have
