"""The golden check passes right teachers of every kind, and refuses really broken ones."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_backend import Backend

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.errors import NumericsError
from dinov3_ray.features import Features
from dinov3_ray.model.golden import agreement, golden_images


def test_the_golden_images_are_the_same_everywhere() -> None:
    images = golden_images(224, 240)
    assert (images.dtype, images.shape) == (torch.uint8, (2, 3, 224, 240))
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest.startswith("b60e5027590c15a2")
    assert images.float().std(dim=(2, 3)).min() > 40  # no channel is flat


@pytest.mark.parametrize(
    ("options", "least"),
    [
        pytest.param({"dtype": "float32"}, 0.999999, id="float32 sdpa"),
        pytest.param({"dtype": "float32", "attention": "eager"}, 0.999999, id="float32 eager"),
        pytest.param({"dtype": "bfloat16"}, 0.9999, id="bfloat16"),
        pytest.param({"dtype": "bfloat16", "image_size": (160, 256)}, 0.9999, id="not square"),
        pytest.param({"dtype": "float16"}, 0.999999, id="float16"),
    ],
)
def test_a_right_teacher_passes(tiny_checkpoint: Path, options: dict[str, Any], least: float) -> None:
    assert least <= DinoV3Teacher(DinoV3Config(tiny_checkpoint, **options)).prove() <= 1 + 1e-6


@pytest.mark.parametrize("variant", ["vit-test-gated", "convnext-test"])
def test_other_architectures_pass(tmp_path: Path, variant: str) -> None:
    path = init_checkpoint(variant, tmp_path / "model")
    assert DinoV3Teacher(DinoV3Config(path, dtype="bfloat16")).prove() > 0.9999


@pytest.mark.slow
def test_a_compiled_teacher_passes_and_gives_any_layers_and_batch_sizes(tmp_path: Path) -> None:
    path = init_checkpoint("vit-test-gated", tmp_path / "model", image_size=64)
    compiled = DinoV3Teacher(DinoV3Config(path, dtype="float32", compile="reduce-overhead"))
    plain = DinoV3Teacher(DinoV3Config(path, dtype="float32"))
    assert compiled.prove() > 0.999999
    images = golden_images(64, 64)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (1, 2, 3, 4):
            batch = images[:1].expand(rows, -1, -1, -1)
            found, expected = (teacher.extract(batch, FeatureSpec(cls=True)).cls for teacher in (compiled, plain))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for layers in ((0,), (1, 0)):
        spec = FeatureSpec(layers=layers, norm=False)
        found, expected = compiled.extract(images, spec).layers, plain.extract(images, spec).layers
        assert list(found) == list(layers)
        for index in layers:
            torch.testing.assert_close(found[index], expected[index], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("device", "compile", "sizes"),
    [("cpu", False, []), ("cpu", True, []), ("cuda:0", False, [8]), ("cuda:0", True, [8])],
)
def test_a_gpu_is_warmed_up_by_the_largest_batch(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device: str, compile: bool, sizes: list[int]
) -> None:
    Backend.in_place_of_inductor(monkeypatch)
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, compile=compile))
    teacher.device = torch.device(device)  # its batches are made on the CPU, as those of requests
    passes = list(teacher.warm_up_passes(8))
    assert [len(images) for images, _ in passes] == sizes
    for images, spec in passes:
        assert isinstance(images, torch.Tensor)
        assert (images.device.type, images.dtype, images.is_contiguous()) == ("cpu", torch.uint8, True)
        assert images.shape[2:] == teacher.image_size
        assert spec.cls
        assert spec.feature_map


def zero_rope(teacher: DinoV3Teacher) -> None:
    teacher.model.rope_embeddings.inv_freq.zero_()


def perturb_weights(teacher: DinoV3Teacher) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in teacher.model.named_parameters():
        if name.endswith("down_proj.weight"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.3)


def drop_layer_scale(teacher: DinoV3Teacher) -> None:
    for name, parameter in teacher.model.named_parameters():
        if name.endswith("lambda1"):
            parameter.fill_(1)


@pytest.mark.parametrize("damage", [zero_rope, perturb_weights, drop_layer_scale])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_teacher_is_refused_with_its_figures(
    tiny_checkpoint: Path, dtype: Any, damage: Callable[[DinoV3Teacher], None]
) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype=dtype))
    with torch.no_grad():
        damage(teacher)
    with pytest.raises(NumericsError, match=rf"{dtype}, attention sdpa.*at least 0.999 .*got cls 0\.\d+.*feature_map"):
        teacher.prove()
    assert teacher.prove(minimum=-1) < 0.999


def test_values_that_are_not_finite_are_refused_by_name(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32"))
    with torch.no_grad():
        teacher.model.norm.weight[7] = float("inf")
    with pytest.raises(NumericsError, match="not finite in cls, feature_map, registers"):
        teacher.prove(minimum=-1)


def test_one_token_gone_wrong_is_not_lost_in_the_mean() -> None:
    right = torch.randn(2, 8, 40, 40, generator=torch.Generator().manual_seed(0))
    wrong = right.clone()
    wrong[1, :, 39, 39] *= -1
    cls = torch.ones(2, 8)
    reference = Features(cls=cls, feature_map=right)
    assert agreement(reference, reference, 0.999, "float32") == pytest.approx(1)
    with pytest.raises(NumericsError, match=r"feature_map 0\.99\d+ \(worst token -1\.0"):
        agreement(Features(cls=cls, feature_map=wrong), reference, 0.998, "float32")


def test_a_wrong_checkpoint_is_told_from_a_wrong_fast_path() -> None:
    good, bad = Features(cls=torch.ones(1, 4)), Features(cls=torch.full((1, 4), float("nan")))
    with pytest.raises(NumericsError, match="the checkpoint itself"):
        agreement(good, bad, 0.999, "bfloat16")
    with pytest.raises(NumericsError, match=r"the teacher \(bfloat16\)"):
        agreement(bad, good, 0.999, "bfloat16")


def test_the_reference_is_freed_at_once(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32"))
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing) is DinoV3Teacher for thing in gc.get_objects())
        teacher.prove()
        assert sum(type(thing) is DinoV3Teacher for thing in gc.get_objects()) == before
    finally:
        gc.enable()
