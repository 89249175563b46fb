"""Float8 linear layers: what they compute, what they replace, and that the golden check has the last word."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from float8 import needs_float8_on_cpu
from torch import nn

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec
from dinov3_ray.errors import NumericsError
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
    multiply_in_float8(blocks, torch.device("cpu"))
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


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU or later"
)
def test_on_a_gpu(tiny_checkpoint: Path) -> None:
    assert DinoV3Teacher(DinoV3Config(tiny_checkpoint, dtype="float8"), "cuda:0").prove(0.998) < 0.9999
