"""The golden check passes right teachers of every kind, and refuses really broken ones."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compile_backend import Backend

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
from dinov3_ray.checkpoint import init_checkpoint, load_model, load_reference
from dinov3_ray.errors import ConfigError, NumericsError
from dinov3_ray.features import Features
from dinov3_ray.images import ImageBatch
from dinov3_ray.model.backbone import run_backbone
from dinov3_ray.model.golden import agreement, golden_images
from dinov3_ray.network.vit import ViT
from dinov3_ray.pool.replica.device_pipeline import inspect_teacher


def test_the_golden_images_are_the_same_everywhere() -> None:
    images = golden_images(224, 240)
    assert (images.dtype, images.shape) == (torch.uint8, (2, 3, 224, 240))
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    assert digest.startswith("b60e5027590c15a2")
    assert images.float().std(dim=(2, 3)).min() > 40  # no channel is flat


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype=dtype, backend="torch"))
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


@pytest.mark.slow
def test_the_reference_is_freed_at_once(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32"))
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing) is ViT for thing in gc.get_objects())
        teacher.prove()
        assert sum(type(thing) is ViT for thing in gc.get_objects()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("variant", ["vit-test", "vit-test-gated", "convnext-test"])
def test_the_reference_holds_one_block_at_a_time_and_equals_the_whole_model(tmp_path: Path, variant: str) -> None:
    config = DinoV3Config(init_checkpoint(variant, tmp_path / "model"))
    whole = load_model(config)
    model, device = load_reference(config, torch.device("cpu"))
    held: list[set[str]] = []

    def note(_module: torch.nn.Module, _given: object) -> None:
        held.append({name for name, tensor in model.named_parameters() if tensor.device.type != "meta"})

    parts = [part for child in model.children() for part in (child.children() if child is model.blocks else [child])]
    for part in parts:
        part.register_forward_pre_hook(note)
    pixels = torch.rand(2, 3, 64, 96)
    layers = tuple(range(len(model.blocks)))
    for spec in (FeatureSpec(cls=True, feature_map=True), FeatureSpec(layers=layers), FeatureSpec(layers=(0,))):
        with torch.no_grad():
            found, expected = run_backbone(model, pixels, spec), run_backbone(whole, pixels, spec)
        for (name, ours), (_, theirs) in zip(found.named(), expected.named(), strict=True):
            assert torch.equal(ours, theirs), name
    largest = max(sum(1 for _ in part.parameters()) for part in parts)
    assert max(map(len, held)) == largest < len(list(model.parameters()))
    assert device.type == "cpu"
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_the_reference_is_plain_float32_whatever_the_process_is_set_to(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32"))
    images, spec = golden_images(*teacher.image_size), FeatureSpec(cls=True, feature_map=True)
    expected = teacher._reference(images, spec, attention="eager")
    backends: Any = torch.backends
    if not hasattr(backends.mkldnn, "matmul"):
        pytest.skip("torch before 2.9 has no settings of each backend")
    modes = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # on many CPUs: products of float32 in bfloat16
        backends.mkldnn.conv.fp32_precision = "bf16"
        settings = [mode.fp32_precision for mode in modes]
        found = teacher._reference(images, spec, attention="eager")
        assert torch.get_float32_matmul_precision() == "medium"
        after = [mode.fp32_precision for mode in modes]
        assert after == settings
    finally:
        torch.set_float32_matmul_precision(before)
        backends.mkldnn.conv.fp32_precision = "none"
    for (name, ours), (_, theirs) in zip(found.named(), expected.named(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_teacher_that_is_wrong_in_large_batches_alone_is_refused(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32"))

    def confuse(_module: torch.nn.Module, _given: object, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if len(tokens) < 5 else torch.cat([tokens[:-1], -tokens[-1:]])

    teacher.model.norm.register_forward_hook(confuse)
    assert teacher.prove() > 0.999999
    assert teacher.prove(rows=4) > 0.999999
    with pytest.raises(NumericsError, match=r"5 images at once.* got cls -"):
        teacher.prove(rows=5)


@pytest.mark.parametrize(
    "arguments",
    [{"minimum": float("nan")}, {"minimum": 1.0}, {"minimum": "0.9"}, {"rows": 0}, {"rows": -1}, {"rows": 2.5}],
)
def test_wrong_arguments_prove_nothing(tiny_checkpoint: Path, arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ConfigError, match=f"{name} must be"):
        DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32")).prove(**arguments)


@pytest.mark.slow
def test_a_pool_proves_its_largest_batch_or_what_fits_of_it(tiny_checkpoint: Path) -> None:
    class Small(DinoV3Teacher):
        def _compute(self, batch: ImageBatch, spec: FeatureSpec) -> Features:
            computed.append(len(batch))
            if len(batch) > fitting:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super()._compute(batch, spec)

    computed: list[int] = []
    fitting = 5
    teacher = Small(DinoV3Config(tiny_checkpoint, dtype="float32"))
    assert inspect_teacher(teacher, max_batch=16).golden_cosine == pytest.approx(1)
    assert computed == [2], "on a CPU, the two images suffice"
    computed.clear()
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), prove=teacher.prove)
    assert inspect_teacher(on_gpu, max_batch=16).golden_cosine == pytest.approx(1)
    assert computed == [2, 16, 2, 8, 2, 4]
    fitting = 1
    with pytest.raises(torch.OutOfMemoryError):
        inspect_teacher(on_gpu, max_batch=16)
