"""The local teacher against transformers driven directly, on real photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModel

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
from dinov3_ray.checkpoint import init_checkpoint
from dinov3_ray.errors import ConfigError, InputError, SpecError
from dinov3_ray.features import deliver, resample_map
from dinov3_ray.teacher import Teacher

EVERYTHING = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(2, 0, -2))
SIZES = [224, 518, (160, 240)]


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint: Path) -> DinoV3Teacher:
    return DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32"))


@pytest.fixture(scope="module")
def convnext(tmp_path_factory: pytest.TempPathFactory) -> DinoV3Teacher:
    path = init_checkpoint("convnext-test", tmp_path_factory.mktemp("convnext") / "model")
    return DinoV3Teacher(DinoV3Config(path, dtype="float32"))


def processed(images: list[Tensor], size: tuple[int, int]) -> Tensor:
    """What transformers' processor makes of uint8 images; test_preprocess.py holds it against the processor."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    resized = [F.interpolate(image[None] * (1 / 255), size, mode="bilinear", antialias=True) for image in images]
    return (torch.cat(resized) - mean[:, None, None]) / std[:, None, None]


def as_map(tokens_BND: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    return tokens_BND[:, prefix:].mT.reshape(len(tokens_BND), -1, *grid)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


# --- the same numbers as transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        pytest.param(size, dtype, marks=pytest.mark.slow if size == 518 or dtype == "bfloat16" else ())
        for size in SIZES
        for dtype in ("float32", "bfloat16")
    ],
    ids=str,
)
def test_outputs_equal_transformers_bit_for_bit(
    tiny_checkpoint: Path, photographs: list[Tensor], size: Any, dtype: Any
) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype=dtype, image_size=size, backend="torch"))
    model = AutoModel.from_pretrained(tiny_checkpoint, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        expected = model(processed(photographs, teacher.image_size))
    features = teacher.extract(photographs, FeatureSpec(cls=True, feature_map=True, registers=True))
    grid = (teacher.image_size[0] // 16, teacher.image_size[1] // 16)
    assert teacher.grid_size == grid
    assert torch.equal(features.cls, expected.pooler_output)
    assert torch.equal(features.registers, expected.last_hidden_state[:, 1:5])
    assert torch.equal(features.feature_map, as_map(expected.last_hidden_state, 5, grid))
    assert torch.equal(teacher.extract_features(photographs), expected.pooler_output.float())
    assert torch.equal(teacher.extract_feature_map(photographs), features.feature_map.float())


@pytest.mark.slow
def test_a_published_architecture_equals_transformers_and_bfloat16_stays_close(
    tmp_path: Path, photographs: list[Tensor]
) -> None:
    path = init_checkpoint("vits16", tmp_path / "vits16", seed=3)
    spec = FeatureSpec(cls=True, feature_map=True, layers=(2, 5, 8, 11))
    features = DinoV3Teacher(DinoV3Config(path, dtype="float32")).extract(photographs[:2], spec)
    with torch.no_grad():
        model = AutoModel.from_pretrained(path).eval()
        expected = model(processed(photographs[:2], (224, 224)), output_hidden_states=True)
    assert torch.equal(features.cls, expected.pooler_output)
    assert torch.equal(features.feature_map, as_map(expected.last_hidden_state, 5, (14, 14)))
    for index, map_BDhw in features.layers.items():
        hidden_state = expected.hidden_states[index + 1]
        # transformers 4 has applied the final norm to the last of them.
        normed = hidden_state if hidden_state is expected.last_hidden_state else model.norm(hidden_state)
        assert torch.equal(map_BDhw, as_map(normed, 5, (14, 14)))
    narrow = DinoV3Teacher(DinoV3Config(path, dtype="bfloat16")).extract(photographs[:2], spec)
    # Measured: 0.007 for CLS and map, less for earlier layers; a broken RoPE or norm gives 0.1 and more.
    for (_, found), (_, exact) in zip(narrow.named(), features.named(), strict=True):
        assert found.dtype == torch.bfloat16
        assert relative_error(found, exact) < 0.015


@pytest.mark.parametrize("norm", [True, False], ids=["normed", "raw"])
def test_layers_equal_hidden_states_and_the_official_indices(
    teacher: DinoV3Teacher, photographs: list[Tensor], norm: bool
) -> None:
    pixels_B3HW = processed(photographs, (224, 224))
    features = teacher.extract(photographs, FeatureSpec(layers=(2, 0, -2), norm=norm))
    assert list(features.layers) == [2, 0, -2]
    assert features.cls is None
    with torch.no_grad():
        model = AutoModel.from_pretrained(teacher.config.root).eval()
        outputs = model(pixels_B3HW, output_hidden_states=True)
        hidden_states = outputs.hidden_states
        if norm:
            if not hasattr(transformers, "DINOv3ViTBackbone"):
                pytest.skip("this transformers has no DINOv3ViTBackbone")
            # The official get_intermediate_layers(n=[0, 1, 2]) is this backbone with out_indices one higher.
            backbone = transformers.DINOv3ViTBackbone.from_pretrained(
                teacher.config.root, out_indices=[1, 2, 3], apply_layernorm=True
            )
            normed_maps = backbone.eval()(pixels_B3HW).feature_maps
    for index, map_BDhw in features.layers.items():
        block = index % 3
        if not norm and block == 2 and hidden_states[-1] is outputs.last_hidden_state:
            continue  # transformers 4 gives what the final norm makes of the last block
        expected = normed_maps[block] if norm else as_map(hidden_states[block + 1], 5, (14, 14))
        assert torch.equal(map_BDhw, expected)


@pytest.mark.parametrize("variant", ["vit-test-gated", "convnext-test"])
def test_other_architectures_equal_transformers(tmp_path: Path, photographs: list[Tensor], variant: str) -> None:
    path = init_checkpoint(variant, tmp_path / "model", image_size=(96, 160))
    teacher = DinoV3Teacher(DinoV3Config(path, dtype="float32"))
    features = teacher.extract(photographs, FeatureSpec(cls=True, feature_map=True))
    with torch.no_grad():
        expected = AutoModel.from_pretrained(path).eval()(processed(photographs, (96, 160)))
    assert torch.equal(features.cls, expected.pooler_output)
    prefix = 1 + teacher.num_register_tokens
    assert torch.equal(features.feature_map, as_map(expected.last_hidden_state, prefix, teacher.grid_size))


def test_a_convnexts_layers_are_its_stages(convnext: DinoV3Teacher, photographs: list[Tensor]) -> None:
    with torch.no_grad():
        model = AutoModel.from_pretrained(convnext.config.root).eval()
        stages = model(processed(photographs, (224, 224)), output_hidden_states=True).hidden_states[1:]
        normed = F.layer_norm(
            stages[3].permute(0, 2, 3, 1), (48,), model.layer_norm.weight, model.layer_norm.bias, eps=1e-6
        )
    raw = convnext.extract(photographs, FeatureSpec(layers=(0, 1, 2, 3), norm=False)).layers
    assert [list(raw[index].shape[1:]) for index in range(4)] == [[16, 56, 56], [24, 28, 28], [32, 14, 14], [48, 7, 7]]
    assert all(torch.equal(raw[index], stages[index]) for index in range(4))
    both = convnext.extract(photographs, FeatureSpec(layers=(2, -1), cls=True)).layers
    assert torch.equal(both[2], stages[2])  # the final norm is the last stage's: of another width, it fits no other
    torch.testing.assert_close(both[-1], normed.permute(0, 3, 1, 2))
    with pytest.raises(SpecError, match="registers must be False for this model: it has 0 register tokens"):
        convnext.extract(photographs, FeatureSpec(cls=True, registers=True))


# --- one pass -------------------------------------------------------------------------------------------------------


def test_one_pass_gives_everything_and_goes_no_further_than_asked(teacher: DinoV3Teacher) -> None:
    ran: list[str] = []
    modules = {"embeddings": teacher.model.embeddings, "norm": teacher.model.norm}
    modules |= {f"block {index}": block for index, block in enumerate(teacher.model.blocks)}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))  # type: ignore[misc]
        for name, module in modules.items()
    ]
    image = torch.rand(1, 3, 64, 64)
    try:
        teacher.extract(image, FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0, -1), norm=False))
        assert ran == ["embeddings", "block 0", "block 1", "block 2", "norm"]
        ran.clear()
        teacher.extract(image, FeatureSpec(layers=(1,), norm=False))
        assert ran == ["embeddings", "block 0", "block 1"]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_the_spec_says_size_and_dtype_of_results(teacher: DinoV3Teacher, photographs: list[Tensor], dtype: Any) -> None:
    plain = teacher.extract(photographs, EVERYTHING)
    spec = FeatureSpec(
        cls=True, feature_map=True, registers=True, layers=EVERYTHING.layers, map_size=(5, 20), dtype=dtype
    )
    features = teacher.extract(photographs, spec)
    resampled = plain.map(lambda _, tensor: resample_map(tensor, (5, 20)) if tensor.ndim == 4 else tensor)
    for (name, found), (_, expected) in zip(features.named(), deliver(resampled, spec).named(), strict=True):
        assert torch.equal(found, expected), name
        assert found.dtype == expected.dtype
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("size", [None, (5, 20)])
@pytest.mark.parametrize("rows", [1, 3])
def test_maps_are_in_the_order_in_which_they_are_computed(
    teacher: DinoV3Teacher, tmp_path: Path, rows: int, size: tuple[int, int] | None
) -> None:
    convnext = DinoV3Teacher(init_checkpoint("convnext-test", tmp_path / "convnext"))
    for one, registers, layers in ((teacher, True, (0, -1)), (convnext, False, (0, 3))):
        for norm in (True, False):
            spec = FeatureSpec(cls=True, feature_map=True, registers=registers, layers=layers, norm=norm, map_size=size)
            for name, tensor in one.extract(torch.rand(rows, 3, 96, 64), spec).named():
                order = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
                assert tensor.stride() == torch.empty(tensor.shape, memory_format=order).stride(), name
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} keeps other tokens' memory"


def test_images_of_any_kind_give_the_same_features(teacher: DinoV3Teacher, photographs: list[Tensor]) -> None:
    batch = torch.stack([photographs[0], photographs[5]])
    expected = teacher.extract_features(batch)
    assert torch.equal(teacher.extract_features([photographs[0], photographs[5]]), expected)
    assert torch.equal(teacher.extract_features(batch.numpy()), expected)
    assert torch.equal(teacher.extract_features(batch * (1 / 255)), expected)
    alone = teacher.extract_features(photographs[0])
    assert alone.shape == (1, 128)
    torch.testing.assert_close(alone, expected[:1])


@pytest.mark.slow
def test_features_carry_the_fingerprint_of_what_made_them(tiny_checkpoint: Path, teacher: DinoV3Teacher) -> None:
    features = teacher.extract(torch.rand(1, 3, 32, 32), FeatureSpec(cls=True))
    assert features.fingerprint == teacher.fingerprint
    other = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16", image_size=240))
    assert other.fingerprint != teacher.fingerprint


# --- frozen ---------------------------------------------------------------------------------------------------------


def test_results_are_ordinary_tensors_even_from_inference_mode(tiny_checkpoint: Path) -> None:
    with torch.inference_mode():
        teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32"))
        features = teacher.extract(torch.rand(1, 3, 224, 224), EVERYTHING)
    assert not any(tensor.is_inference() for _, tensor in features.named())
    assert not any(parameter.is_inference() for parameter in teacher.parameters())


def test_a_callers_autocast_does_not_reach_the_teacher(teacher: DinoV3Teacher, photographs: list[Tensor]) -> None:
    expected = teacher.extract_feature_map(photographs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.extract_feature_map(photographs), expected)


@pytest.mark.slow
def test_moving_to_bfloat16_equals_loading_in_it(tiny_checkpoint: Path, photographs: list[Tensor]) -> None:
    moved = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float32")).to(torch.bfloat16)
    loaded = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="bfloat16"))
    assert moved.dtype == torch.bfloat16
    assert moved.model.rope_embeddings.inv_freq.dtype == torch.float32
    for (_, a), (_, b) in zip(
        moved.extract(photographs, EVERYTHING).named(), loaded.extract(photographs, EVERYTHING).named(), strict=True
    ):
        assert torch.equal(a, b)


# --- use ------------------------------------------------------------------------------------------------------------


def test_attributes_and_repr_say_what_it_is(teacher: DinoV3Teacher, convnext: DinoV3Teacher) -> None:
    assert isinstance(teacher, Teacher)
    assert repr(teacher) == "DinoV3Teacher(vit, D=128, layers=3, image=224x224, device=cpu, dtype=float32)"
    assert (teacher.hidden_size, teacher.depth, teacher.patch_size, teacher.num_register_tokens) == (128, 3, 16, 4)
    assert (convnext.hidden_size, convnext.depth, convnext.patch_size, convnext.num_register_tokens) == (48, 4, 32, 0)
    assert (teacher.image_size, teacher.grid_size) == ((224, 224), (14, 14))
    assert (teacher.device, teacher.dtype) == (torch.device("cpu"), torch.float32)


def test_dtype_auto_is_said_once_and_a_chosen_one_is_not(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="dinov3_ray")
    teacher = DinoV3Teacher(tiny_checkpoint)
    teacher.extract_features(torch.rand(1, 3, 32, 32))
    (record,) = caplog.records
    chosen = str(teacher.dtype).removeprefix("torch.")
    assert record.getMessage().startswith(f"dtype='auto' computes in {chosen} on cpu: this CPU ")
    caplog.clear()
    assert DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float16"), "cpu").dtype == torch.float16
    assert not caplog.records


def test_the_seeds_snippets_work(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dinov3").symlink_to(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    from dinov3_ray.config import DinoV3Config
    from dinov3_ray.model import DinoV3Teacher

    cfg = DinoV3Config(root=Path("dinov3"))
    device = torch.device("cpu")
    teacher = DinoV3Teacher(cfg, device)
    images = torch.randn(4, 3, 512, 512).to(device)
    with torch.no_grad():
        cls_features = teacher.extract_features(images)
        feature_map = teacher.extract_feature_map(images)
    assert cls_features.shape == (4, 128)
    assert feature_map.shape == (4, 128, 14, 14)
    teacher.eval()
    student_features = torch.randn(4, 128, 14, 14, requires_grad=True)
    loss = F.cosine_embedding_loss(
        student_features.flatten(2).transpose(1, 2).flatten(0, 1),
        feature_map.flatten(2).transpose(1, 2).flatten(0, 1),
        target=torch.ones(4 * 14 * 14),
    )
    loss.backward()
    assert torch.isfinite(student_features.grad).all()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "spec", "error", "complaint"),
    [
        (torch.rand(1, 3, 15, 64), EVERYTHING, InputError, "at least 16 pixels"),
        (torch.rand(1, 2, 64, 64), EVERYTHING, InputError, "3 channels"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), EVERYTHING, InputError, "got torch.int32"),
        (torch.rand(0, 3, 64, 64), EVERYTHING, InputError, "empty batch"),
        (torch.rand(1, 3, 64, 64), FeatureSpec(), SpecError, "at least one of"),
        (torch.rand(1, 3, 64, 64), FeatureSpec(layers=(3,)), SpecError, "-3..2 for this model; got 3"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(
    teacher: DinoV3Teacher, images: Tensor, spec: FeatureSpec, error: type[Exception], complaint: str
) -> None:
    ran: list[object] = []
    hook = teacher.model.embeddings.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(error, match=complaint):
            teacher.extract(images, spec)
    finally:
        hook.remove()
    assert not ran


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 1.5])
def test_a_device_that_is_not_there_is_refused_before_loading(tiny_checkpoint: Path, device: Any) -> None:
    with pytest.raises(ConfigError, match="device must be"):
        DinoV3Teacher(tiny_checkpoint, device)
