"""Vision towers, masked-image models and others that AutoModel opens only in part, held against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from file_changes import change_json, change_weights
from safetensors.torch import load_file
from torch import Tensor
from transformers_models import KINDS, OTHERS, SIGLIP, TOWERS, write_transformers

from dinov3_ray import FeatureSpec
from dinov3_ray.checkpoint import fingerprint, verify
from dinov3_ray.config import open_config
from dinov3_ray.errors import CheckpointError, ConfigError
from dinov3_ray.images import ImageBatch
from dinov3_ray.model import TransformersTeacher
from dinov3_ray.model.preprocess import preprocess

VIT = SIGLIP | {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 70, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "config", "path"), [(n, *given) for n, given in (TOWERS | OTHERS).items()])
def test_the_vision_model_in_another_is_transformers_own_bit_for_bit(
    tmp_path: Path, images: Tensor, architecture: str, config: dict[str, Any], path: str
) -> None:
    root = write_transformers(tmp_path / "model", architecture, config, VIT)
    teacher = TransformersTeacher(root, dtype="float32")
    found = teacher.extract(images, FeatureSpec(feature_map=True)).feature_map
    assert found is not None
    whole = getattr(transformers, architecture).from_pretrained(root, dtype=torch.float32).eval()
    pixels = preprocess(ImageBatch.of(images), teacher.preprocessing, torch.device("cpu"))
    with torch.no_grad():
        expected = whole.get_submodule(path)(pixel_values=pixels).last_hidden_state
    assert torch.equal(found.flatten(2).transpose(1, 2), expected[:, -found[0, 0].numel() :])
    verify(open_config(root), values=True)
    assert len(fingerprint(open_config(root))) == 24


def test_a_towers_weights_are_all_accounted_for(tmp_path: Path) -> None:
    root = write_transformers(tmp_path / "model", "BlipModel", TOWERS["BlipModel"][0], VIT)
    change_weights(root, adapter=torch.ones(3))
    with pytest.raises(CheckpointError, match=r"describes:\n  - adapter is unexpected$"):
        TransformersTeacher(root)
    write_transformers(root, "BlipModel", TOWERS["BlipModel"][0], VIT)
    names = load_file(root / "model.safetensors")
    name = next(name for name in names if name.startswith("vision_model.encoder.layers.2"))
    change_weights(root, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"describes:\n  - {name.removeprefix('vision_model.')} is missing$"):
        TransformersTeacher(root)


def test_a_tower_whose_class_is_not_named_is_refused_with_the_remedy(tmp_path: Path) -> None:
    root = write_transformers(tmp_path / "model", "BlipVisionModel", TOWERS["BlipVisionModel"][0], VIT)
    change_json(root / "config.json", architectures=None)
    with pytest.raises(ConfigError, match=r"architectures must name the model's class in transformers, such as"):
        TransformersTeacher(root)


def test_a_parameter_may_not_be_an_integer_though_a_buffer_may(tmp_path: Path) -> None:
    root = write_transformers(tmp_path / "model", *KINDS["dinov2"])
    change_weights(root, **{"layernorm.bias": torch.ones(32, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=r"layernorm\.bias must be one of F32, BF16, F16; found I64"):
        TransformersTeacher(root)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"num_attention_heads": 3},  # which some releases of transformers build, and others do not
            (CheckpointError, ConfigError),
            r"0\.attention\.k_proj\.bias: expected \[30\], found \[32\]|hidden size 32 is not a multiple of the number",
        ),
        ({"image_size": 70}, CheckpointError, r"position_embeddings: expected \[1, 26, 32\], found \[1, 82, 32\]$"),
        ({"hidden_act": "nope"}, ConfigError, r"config\.json: hidden_act must be one that .* dinov2; got 'nope'$"),
    ],
)
def test_a_config_of_another_shape_is_told_by_tensors_or_by_its_key(
    tmp_path: Path, changes: dict[str, object], error: Any, message: str
) -> None:
    root = write_transformers(tmp_path / "model", *KINDS["dinov2"])
    change_json(root / "config.json", **changes)
    with pytest.raises(error, match=message):
        TransformersTeacher(root)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("VideoMAEModel", {}, r"it takes more than one image's pixel_values \(such as text or frames\)"),
        ("ViltModel", {"vocab_size": 50}, r"it takes more than one image's pixel_values \(such as text or frames\)"),
        ("PixtralVisionModel", {}, r"gets \[1, 32, 32\] for 2 images, which are not 4 x 4 patches"),
        ("Dinov2Model", {"image_size": [64, 96]}, r"take square positions only; those of this model are of 64x96 px"),
    ],
)
def test_a_model_that_takes_another_input_is_refused_by_what_it_takes(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    root = write_transformers(tmp_path / "model", architecture, TOWERS["BlipVisionModel"][0] | changes, VIT)
    with pytest.raises(ConfigError, match=message):
        TransformersTeacher(root)


@pytest.mark.parametrize("named", ["BeitImageProcessor", "BeitFeatureExtractor", "BlipImageProcessor"])
def test_processors_of_the_same_arithmetic_are_taken_by_any_of_their_names(tmp_path: Path, named: str) -> None:
    key = "feature_extractor_type" if named.endswith("FeatureExtractor") else "image_processor_type"
    values = {name: value for name, value in VIT.items() if name not in ("image_processor_type", "resample")}
    root = write_transformers(tmp_path / "model", "BeitModel", OTHERS["BeitModel"][0], values | {key: named})
    assert open_config(root).preprocessing.resample == "bicubic"
    change_json(root / "preprocessor_config.json", **{key: "LevitFeatureExtractor"})
    with pytest.raises(
        ConfigError, match=r"BeitImageProcessor, .*or the same as FeatureExtractor\); if the model's own"
    ):
        open_config(root)
