"""Students by name: what they give, and that their own framework loads what is written. timm and Ultralytics need
torchvision: their tests run where they can be imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectors import equal_weights
from students import pyramid, small
from torch import Tensor

from dinov3_ray.distillation.frameworks import OpenedStudent
from dinov3_ray.distillation.student_backbone import IMAGENET, PLAIN, StudentBackbone, coarsest_last, find_maps
from dinov3_ray.distillation.students import open_student
from dinov3_ray.errors import ConfigError

SIZE = (64, 96)


def views() -> Tensor:
    return torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def trained(student: OpenedStudent) -> None:
    """Weights that no initialisation gives."""
    for parameter in student.backbone.net.parameters():
        parameter.data.add_(0.01)


def test_maps_are_found_in_what_networks_give_and_one_is_left_of_each_resolution() -> None:
    fine, later, coarse = torch.zeros(1, 2, 8, 8), torch.ones(1, 3, 8, 8), torch.zeros(1, 4, 4, 4)
    assert find_maps(torch.zeros(1, 5)) == []
    assert [found.shape[1] for found in find_maps({"a": coarse, "b": (fine, [later])})] == [4, 2, 3]
    assert [found.shape[1] for found in coarsest_last([coarse, fine, later])] == [3, 4]


def test_a_students_maps_are_outputs_of_layers_and_its_pixels_are_normalised() -> None:
    net = pyramid().eval()
    backbone = StudentBackbone(net, statistics=IMAGENET, size=SIZE).eval()
    maps = backbone(views())
    assert [tuple(found.shape) for found in maps] == [(2, 8, 8, 12), (2, 16, 4, 6)]
    assert backbone.last_level == "levels.1"
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    expected = net((views() / 255 - mean) / std)
    assert torch.allclose(maps[1], expected["coarse"], atol=1e-6)
    assert set(backbone.state_dict()) == {f"net.{name}" for name in net.state_dict()}


def test_a_network_that_fails_on_the_size_is_told_so() -> None:
    with pytest.raises(ConfigError, match=r"student must take images \[B,3,8,8\].*--image-size"):
        StudentBackbone(small(), statistics=PLAIN, size=(8, 8))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("students:pyramit", "no 'pyramit'. Near it: pyramid"),
        ("students:nothing", "that returns an nn.Module; students:nothing returned Tensor"),
        ("no_such_module:make", "'no_such_module' cannot: ModuleNotFoundError: No module named"),
        ("students:fails", r"without arguments; students:fails raised OSError: no such weights$"),
        ("students:sized", r"without arguments; students:sized raised TypeError: sized\(\) missing 1 required"),
        ("transformers:resnett", "Near it: .*resnet"),
    ],
)
def test_a_name_that_is_nobodys_is_told_with_what_is_like_it(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_student(name, size=SIZE)


def test_a_module_that_is_no_python_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_student.py").write_text("def make(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'broken_student' cannot: SyntaxError: invalid syntax"):
        open_student("broken_student:make", size=SIZE)


def test_without_timm_a_plain_name_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov3_ray.distillation.students.is_installed", lambda package: False)
    with pytest.raises(ConfigError, match=r"'resnet': a plain name is timm's.*transformers:resnet"):
        open_student("resnet", size=SIZE)


def test_weights_are_not_asked_of_what_has_none() -> None:
    with pytest.raises(ConfigError, match="pretrained needs weights"):
        open_student("transformers:resnet", pretrained=True)
    with pytest.raises(ConfigError, match="loads its own weights"):
        open_student("students:small", pretrained=True)


def test_a_module_of_ones_own_comes_back_from_both_files(tmp_path: Path) -> None:
    from safetensors.torch import load_model

    student = open_student("students:small", size=SIZE)
    trained(student)
    student.write(tmp_path)
    for load in (
        lambda net: net.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True)),
        lambda net: load_model(net, tmp_path / "model.safetensors"),
    ):
        again = small()
        load(again)
        assert equal_weights(again, student.backbone.net)


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ResNetConfig

    folder = tmp_path_factory.mktemp("resnet")
    ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 64], embedding_size=16).save_pretrained(folder)
    statistics = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}'
    (folder / "preprocessor_config.json").write_text(statistics)
    return folder


def test_a_backbone_of_transformers_gives_its_stages_and_is_loaded_by_transformers(
    resnet_folder: Path, tmp_path: Path
) -> None:
    from transformers import ResNetBackbone, ResNetForImageClassification

    student = open_student(str(resnet_folder), size=SIZE)
    assert student.backbone.statistics == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert [found.shape[1] for found in student.backbone(views())] == [16, 32, 64, 64]
    trained(student)
    student.write(tmp_path)
    pixels = views() / 255
    expected = student.backbone.net.eval()(pixels).feature_maps
    again = ResNetBackbone.from_pretrained(tmp_path).eval()(pixels).feature_maps
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(again, expected, strict=True))
    whole, told = ResNetForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["missing_keys"]) == {"classifier.1.weight", "classifier.1.bias"}
    assert torch.allclose(whole.eval().resnet(pixels).last_hidden_state, expected[-1], atol=1e-5)
    begun = open_student(str(tmp_path), pretrained=True, size=SIZE).backbone.net
    assert equal_weights(begun, student.backbone.net)


@pytest.mark.parametrize("plain", [False, True])
def test_models_of_transformers_without_a_backbone_give_maps_too(plain: bool, tmp_path: Path) -> None:
    from transformers import AutoModel, RegNetConfig, ViTConfig

    if plain:
        config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        config.image_size, config.patch_size = SIZE, 16
    else:
        config = RegNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], embedding_size=8, groups_width=8)
    config.save_pretrained(tmp_path / "config")
    student = open_student(f"transformers:{tmp_path / 'config'}", size=SIZE)
    assert student.backbone(views())[-1].shape == ((2, 16, 4, 6) if plain else (2, 32, 2, 3))
    trained(student)
    (tmp_path / "student").mkdir()
    student.write(tmp_path / "student")
    assert equal_weights(AutoModel.from_pretrained(tmp_path / "student"), student.backbone.net)


def test_a_model_of_timm_gives_its_stages_and_is_loaded_by_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    student = open_student("timm:resnet18", size=SIZE)
    assert student.backbone.statistics == IMAGENET
    assert [found.shape[1] for found in student.backbone(views())] == [64, 64, 128, 256, 512]
    trained(student)
    student.write(tmp_path)
    again = timm.create_model("resnet18", checkpoint_path=str(tmp_path / "model.safetensors"))
    assert equal_weights(again, student.backbone.net)
    with pytest.raises(ConfigError, match=r"it has no 'resnet18s'. Near it: .*resnet18"):
        open_student("resnet18s", size=SIZE)


def test_a_transformer_of_timm_takes_another_size(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    student = open_student("vit_tiny_patch16_224", size=SIZE)
    assert [tuple(found.shape) for found in student.backbone(views())] == [(2, 192, 4, 6)]
    student.write(tmp_path)
    assert "img_size=(64, 96)" in student.usage
    timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "model.safetensors"), img_size=SIZE)


def test_the_backbone_of_a_yaml_is_trained_and_ultralytics_loads_it(tmp_path: Path) -> None:
    ultralytics = pytest.importorskip("ultralytics", exc_type=ImportError)
    student = open_student("yolo11n.yaml", size=SIZE)
    assert student.backbone.statistics == PLAIN
    maps = student.backbone.eval()(views())
    assert [tuple(found.shape[1:]) for found in maps] == [
        (16, 32, 48),
        (64, 16, 24),
        (128, 8, 12),
        (128, 4, 6),
        (256, 2, 3),
    ]
    kept: list[Tensor] = []
    handle = student.backbone.net.model[10].register_forward_hook(lambda *given: kept.append(given[2]))
    student.backbone.net.eval()(views() / 255)
    handle.remove()
    assert torch.allclose(kept[0], maps[-1], atol=1e-5)
    trained(student)
    student.write(tmp_path)
    assert equal_weights(ultralytics.YOLO(tmp_path / "model.pt").model.float(), student.backbone.net)
