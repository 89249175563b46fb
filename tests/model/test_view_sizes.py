"""Teachers whose input follows the images: against transformers on the same pixels, in local mode, and their errors."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel
from transformers_models import KINDS, last_hidden_state, write_transformers

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, TeacherPool
from dinov3_ray.checkpoint import fingerprint, init_checkpoint
from dinov3_ray.config import open_config
from dinov3_ray.config.preprocessing import ViewSize
from dinov3_ray.datasets import CachedTeacher
from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.model import TransformersTeacher, open_teacher
from dinov3_ray.training.prefetch import prefetch

EVERYTHING = FeatureSpec(cls=True, feature_map=True, registers=True)
MAP = FeatureSpec(feature_map=True)


@pytest.fixture(scope="module")
def followers(tiny_checkpoint: Path) -> dict[ViewSize, DinoV3Teacher]:
    return {size: DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32", image_size=size)) for size in SIZES}


SIZES: tuple[ViewSize, ...] = ("input", "input/2")


def views(height: int, width: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def pixels_of(images: Tensor, size: ViewSize, patch: int = 16) -> Tensor:
    """What a model is to see of uint8 images: cut to whole patches, or resized to half."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels, (height, width) = images * (1 / 255), images.shape[2:]
    if size == "input":
        pixels = pixels[:, :, : height - height % patch, : width - width % patch]
    else:
        half = int(height / 2 / patch) * patch, int(width / 2 / patch) * patch
        pixels = F.interpolate(pixels, half, mode="bilinear", antialias=True)
    return ((pixels - mean[:, None, None]) / std[:, None, None]).contiguous()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", [(224, 224), (160, 304), (230, 333), (33, 47)], ids=str)
def test_features_are_those_of_transformers_on_the_images_own_pixels(
    followers: dict[ViewSize, DinoV3Teacher], view: tuple[int, int], size: ViewSize
) -> None:
    images = views(*view)
    model: Any = AutoModel.from_pretrained(followers[size].config.root, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(pixels_of(images, size))
    features = followers[size].extract(images, EVERYTHING)
    part = 16 if size == "input" else 32
    grid = (view[0] // part, view[1] // part)
    assert torch.equal(features.cls, expected.pooler_output)
    assert torch.equal(features.feature_map, expected.last_hidden_state[:, 5:].mT.reshape(2, -1, *grid))
    # Floats are taken as they are, and images of other sizes that come to the same one share a batch.
    assert torch.equal(followers[size].extract(images * (1 / 255), EVERYTHING).cls, features.cls)


def test_the_pixels_that_are_cut_off_and_those_that_are_not(followers: dict[ViewSize, DinoV3Teacher]) -> None:
    images = views(70, 85, 1)
    changed = images.clone()
    changed[:, :, 64:], changed[:, :, :, 80:] = 0, 0
    whole, cut = (followers["input"].extract(view, MAP).feature_map for view in (images, changed))
    assert torch.equal(whole, cut)
    whole, cut = (followers["input/2"].extract(view, MAP).feature_map for view in (images, changed))
    assert not torch.equal(whole, cut), "half of the whole view is seen"


def test_a_convnext_sees_no_more_than_whole_patches(tmp_path: Path) -> None:
    root = init_checkpoint("convnext-test", tmp_path / "model")
    teacher = DinoV3Teacher(DinoV3Config(root, dtype="float32", image_size="input"))
    images = views(100, 75)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(root).eval()(pixels_of(images, "input", teacher.patch_size))
    features = teacher.extract(images, FeatureSpec(cls=True, feature_map=True))
    assert torch.equal(features.cls, expected.pooler_output)
    assert features.feature_map.shape[2:] == (3, 2)


@pytest.mark.slow
def test_a_crop_gives_way_to_the_view_and_the_rest_of_the_rule_stays(tmp_path: Path) -> None:
    # DINOv2's: bicubic, and a crop of the centre.
    root = write_transformers(tmp_path / "dinov2", *KINDS["dinov2"])
    images = views(90, 120)
    model = AutoModel.from_pretrained(root, dtype=torch.float32).eval()
    factor = 1.0 / 0.00392156862745098
    mean, std = (torch.tensor(values) * factor for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for size, grid in (("input", (6, 8)), ("input/2", (3, 4))):
        teacher = TransformersTeacher(root, dtype="float32", image_size=size)
        resized = images[:, :, :84, :112]
        if size == "input/2":
            resized = F.interpolate(images, (42, 56), mode="bicubic", antialias=True)
        pixels = (resized.float() - mean[:, None, None]) / std[:, None, None]
        expected_BND, _ = last_hidden_state(model, pixels)
        found = teacher.extract(images, FeatureSpec(cls=True, feature_map=True))
        assert torch.equal(found.cls, expected_BND[:, 0])
        assert torch.equal(found.feature_map, expected_BND[:, 1:].mT.reshape(2, -1, *grid))
        assert teacher.prove() > 0.9999


def test_a_model_of_one_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a model without a way to resize its positions; all that are tested here have one.
    from transformers import SiglipVisionModel

    whole = SiglipVisionModel.forward
    monkeypatch.setattr(SiglipVisionModel, "forward", lambda self, pixel_values: whole(self, pixel_values))
    root = write_transformers(tmp_path / "siglip2", *KINDS["siglip2"])
    assert TransformersTeacher(root).grid_size == (4, 4)
    with pytest.raises(ConfigError, match=r"its own is 64x64\); got one that follows the images, of which one has 48x"):
        TransformersTeacher(root, image_size="input")


# The configuration --------------------------------------------------------------------------------------------------


def test_the_configuration_keeps_the_word_and_a_nominal_size(tiny_checkpoint: Path) -> None:
    config = DinoV3Config(tiny_checkpoint, image_size="input/2")
    assert (config.image_size, config.nominal_size, config.grid_size) == ("input/2", (224, 224), (14, 14))
    assert replace(config, dtype="float32").image_size == "input/2"
    assert replace(config, image_size=64).image_size == (64, 64)
    assert open_config(config, image_size="input").image_size == "input"
    assert pickle.loads(pickle.dumps(config)) == config
    assert "image=input/2" in repr(config)
    assert config.compile_mode("cuda") is None, "auto compiles nothing where sizes vary"
    assert replace(config, compile=True).compile_mode("cuda") == "default"
    described = [DinoV3Config(tiny_checkpoint, image_size=size).preprocessing.described() for size in (*SIZES, 224)]
    assert [rule.get("follows") for rule in described] == ["input", "input/2", None]
    assert described[0]["multiple"] == 16
    assert len({fingerprint(DinoV3Config(tiny_checkpoint, image_size=size)) for size in (*SIZES, 224)}) == 3
    with pytest.raises(ConfigError, match=r"image_size must be None, .*, 'input' or 'input/2'; got 'input/3'"):
        DinoV3Config(tiny_checkpoint, image_size="input/3")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_proven_and_tried_at_the_nominal_size(
    followers: dict[ViewSize, DinoV3Teacher], size: ViewSize, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    compute = DinoV3Teacher._run

    def run(self: DinoV3Teacher, model: Any, pixels_B3HW: Tensor, spec: FeatureSpec) -> Any:
        seen.append(pixels_B3HW.shape)
        return compute(self, model, pixels_B3HW, spec)

    monkeypatch.setattr(DinoV3Teacher, "_run", run)
    assert followers[size].prove(rows=3) > 0.9999
    assert seen == [(2, 3, 224, 224), (3, 3, 224, 224)]


# Wrong images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "least"), [("input", 16), ("input/2", 32)])
@pytest.mark.parametrize("where", ["local", "cached", "local mode"])
def test_images_below_a_patch_and_mixed_sizes_are_refused_before_anything_is_sent(
    followers: dict[ViewSize, DinoV3Teacher], size: ViewSize, least: int, where: str, tmp_path: Path
) -> None:
    local = followers[size]
    pool = None
    teacher: Any = CachedTeacher(local, tmp_path / "cache", max_bytes=2**21) if where == "cached" else local
    if where == "local mode":
        pool = TeacherPool.start(local.config, name="views", replicas=1, local_mode=True)
        teacher = pool.teacher()
    try:
        with pytest.raises(InputError, match=rf"at least {least} pixels high and wide \(one patch of the model's"):
            teacher.extract(views(least - 1, 64), MAP)
        assert teacher.extract(views(least, 64), MAP).feature_map.shape == (2, 128, 1, 128 // least // 2)
        mixed = [views(64, 64)[0], views(64, 96)[0]]
        told = rf"must come to one size, but image_size='{size}' takes each at a size of its own: \[\("
        with pytest.raises(InputError, match=told):
            teacher.extract(mixed, MAP)
        alike = [views(64, 64)[0], views(70, 79)[0]]
        assert torch.equal(teacher.extract(alike, MAP).feature_map, local.extract(alike, MAP).feature_map)
        if pool is not None:
            assert pool.status().replicas[0].statistics.errors == 0
    finally:
        if pool is not None:
            pool.shutdown()


# Ahead of a loop ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loop_whose_batches_change_their_size(followers: dict[ViewSize, DinoV3Teacher]) -> None:
    loader = [views(side, side + 32) for side in (64, 96, 64, 160, 33)]
    for size, local in followers.items():
        with TeacherPool.start(local.config, name="views", replicas=2, local_mode=True) as pool:
            remote = pool.teacher()
            assert (remote.image_size, remote.grid_size) == (size, (14, 14))
            for batch, targets in prefetch(remote, loader, MAP):
                assert torch.equal(targets.feature_map, local.extract(batch, MAP).feature_map)


def test_requests_of_different_sizes_share_no_pass(followers: dict[ViewSize, DinoV3Teacher]) -> None:
    local = followers["input"]
    options = {"batching": "dynamic", "max_batch": 8, "max_wait": 0.05}
    with TeacherPool.start(local.config, name="views", replicas=1, local_mode=True, **options) as pool:
        remote = pool.teacher()
        batches = [views(side, 64) for side in (64, 80, 64, 96, 80)]
        handles = [remote.submit(batch, MAP) for batch in batches]
        for batch, handle in zip(batches, handles, strict=True):
            found = handle.result(timeout=60).feature_map
            torch.testing.assert_close(found, local.extract(batch, MAP).feature_map, atol=1e-4, rtol=1e-4)


def test_the_teacher_of_a_directory_takes_it(tiny_checkpoint: Path) -> None:
    teacher = open_teacher(tiny_checkpoint, dtype="float32", image_size="input")
    assert teacher.extract_feature_map(views(64, 96)).shape == (2, 128, 4, 6)
    copied = pickle.loads(pickle.dumps(teacher))
    assert copied.image_size == "input"
    assert copied.fingerprint == teacher.fingerprint
