"""No torch tensor is pickled on the data path, on either side: Ray would copy it on every fetch."""

from __future__ import annotations

import functools
import sys

import pytest
import ray
import torch

from dinov3_ray import FeatureSpec, TeacherPool
from dinov3_ray.features import Features
from dinov3_ray.images import Images
from dinov3_ray.testing import FakeTeacher

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas cannot import the tests

EVERYTHING = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0,))


def refuse(tensor: torch.Tensor, protocol: object) -> None:
    raise AssertionError(f"a torch tensor of shape {list(tensor.shape)} is being pickled")


class Guarded(FakeTeacher):
    """A teacher in whose process no tensor can be pickled."""

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        torch.Tensor.__reduce_ex__ = refuse  # type: ignore[assignment,method-assign]
        return super().extract(images, spec)


@pytest.mark.parametrize("dtype", ["native", "bfloat16", "int8"])
@pytest.mark.parametrize("side", [32, 320], ids=["inside-the-call", "through-the-store"])
def test_no_tensor_is_pickled(guarded: TeacherPool, monkeypatch: pytest.MonkeyPatch, side: int, dtype: str) -> None:
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    spec = FeatureSpec(feature_map=True, dtype=dtype)  # type: ignore[arg-type]
    expected = FakeTeacher().extract(images, spec).feature_map
    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", refuse)
    for view in (images, images.numpy(), list(images)):
        features = guarded.teacher().extract(view, spec)
        assert features.feature_map is not None
        assert expected is not None
        assert torch.equal(features.feature_map, expected)


@pytest.fixture(scope="module")
def guarded(ray_cluster: str):  # type: ignore[no-untyped-def]
    with TeacherPool.start(functools.partial(Guarded), name="guarded", replicas=1) as pool:
        yield pool


def test_the_guard_would_notice(monkeypatch: pytest.MonkeyPatch, ray_cluster: str) -> None:
    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", refuse)
    with pytest.raises(AssertionError, match="is being pickled"):
        ray.put(torch.zeros(2))
