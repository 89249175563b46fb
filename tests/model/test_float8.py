"""Float8 linear layers: what they compute, what they replace, and that the golden check has the last word."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from float8 import needs_float8_on_cpu
from torch import nn

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
from dinov3_ray.errors import ConfigError, NumericsError
from dinov3_ray.model.float8 import Float8Linear, multiply_in_float8


def a_linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 96, bias=bias, dtype=torch.bfloat16)


@needs_float8_on_cpu
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_as_exact_as_float8_allows(bias: bool) -> None:
    linear = a_linear(bias)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    x[0] *= 1000  # each token has a scale of its own
    x[1, 0] = 0
    found, expected = Float8Linear(linear)(x), linear(x)
    assert (found.dtype, found.shape) == (torch.bfloat16, (2, 5, 96))
    errors = (found.float() - expected.float()).norm(dim=-1)
    assert (errors <= 0.05 * expected.float().norm(dim=-1) + 1e-6).all()


@needs_float8_on_cpu
def test_what_moves_it_leaves_its_dtypes() -> None:
    layer = Float8Linear(a_linear())
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    before = layer(x)
    assert torch.equal(copy.deepcopy(layer).to(torch.float16).double()(x), before)
    assert layer.to("meta").weight.device.type == "meta"


def test_layers_that_do_not_fit_stay() -> None:
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 16), nn.Linear(24, 16)), nn.Linear(16, 16)]).bfloat16()
    multiply_in_float8(blocks)
    assert [type(one) for one in (blocks[0][0], blocks[0][1], blocks[1])] == [Float8Linear, nn.Linear, Float8Linear]


@needs_float8_on_cpu
def test_a_teacher_computes_in_float8_where_it_is_asked_to(tiny_checkpoint: Path) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float8", image_size=64))
    assert (teacher.dtype, "dtype=float8" in repr(teacher)) == (torch.bfloat16, True)
    assert sum(isinstance(module, Float8Linear) for module in teacher.modules()) == 3 * 6
    features = teacher.extract(torch.rand(2, 3, 32, 32), FeatureSpec(cls=True))
    assert features.cls is not None
    assert features.cls.dtype == torch.bfloat16
    assert 0.999 < teacher.prove() < 0.9999  # it is float8: bfloat16 comes closer
    with pytest.raises(NumericsError, match=r"\(float8, attention sdpa"):
        teacher.prove(minimum=0.9999)


def test_sums_are_the_fast_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def product(rows: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(options)
        return torch.zeros(len(rows), weight.shape[1], dtype=torch.bfloat16)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    Float8Linear(a_linear())(torch.zeros(3, 64, dtype=torch.bfloat16))
    assert seen[0]["use_fast_accum"] is True


REFUSAL = "Rowwise scaling is not currently supported on your device"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "error"), [((8, 9), RuntimeError(REFUSAL)), ((12, 0), ValueError(REFUSAL))], ids=["Ada", "Blackwell"]
)
def test_a_device_is_asked_by_one_product(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], error: Exception
) -> None:
    config = DinoV3Config(tiny_checkpoint, dtype="float8", image_size=64)
    with FakeCuda(capability=capability, name="Fake GPU") as cuda:
        assert any("_scaled_mm" in name for _, _, name in loaded(config, cuda).watch.launches)

        def refuse(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(torch, "_scaled_mm", refuse)
        with pytest.raises(ConfigError, match=rf"on Fake GPU, torch .*{REFUSAL} \(use dtype='bfloat16'"):
            loaded(config, cuda)
        error = torch.OutOfMemoryError("CUDA out of memory")
        with pytest.raises(torch.OutOfMemoryError):
            loaded(config, cuda)


def loaded(config: DinoV3Config, cuda: FakeCuda) -> FakeCuda:
    DinoV3Teacher(config, "cuda:1")
    return cuda


@needs_float8_on_cpu
def test_a_teacher_is_asked_again_where_it_is_moved(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float8", image_size=64))
    product = torch._scaled_mm

    def not_on_a_gpu(rows: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if rows.is_cuda:
            raise RuntimeError(REFUSAL)
        return product(rows, *args, **options)

    monkeypatch.setattr(torch, "_scaled_mm", not_on_a_gpu)
    with FakeCuda(), pytest.raises(ConfigError, match=REFUSAL):
        teacher.to("cuda:1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compile", "device", "warns"), [(False, "cuda:1", 1), ("auto", "cuda:1", 0), (False, "cpu", 0)]
)
def test_float8_that_is_not_compiled_earns_a_warning_on_a_gpu(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture, compile: Any, device: str, warns: int
) -> None:
    with FakeCuda():
        DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float8", image_size=64, compile=compile), device)
    assert caplog.text.count("dtype='float8' is slower than bfloat16") == warns


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with float8"
)
def test_on_a_gpu(tiny_checkpoint: Path) -> None:
    assert DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float8"), "cuda:0").prove(0.998) < 0.9999
