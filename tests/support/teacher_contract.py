"""What each teacher must do: fake, local, in a local-mode pool, and in a pool of Ray actors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov3_ray import FeatureSpec
from dinov3_ray.config.preprocessing import Preprocessing
from dinov3_ray.errors import InputError, SpecError
from dinov3_ray.teacher import Teacher
from dinov3_ray.testing import FakeTeacher

EVERYTHING = FeatureSpec(cls=True, feature_map=True, registers=True, layers=(0, -1))


class TeacherContract:
    """Tests for a module that has a fixture ``teacher``: D=128, 224 px, 3 blocks, float32."""

    @pytest.fixture
    def images(self) -> Tensor:
        return torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def test_satisfies_the_protocol(self, teacher: Teacher) -> None:
        assert isinstance(teacher, Teacher)

    def test_shapes_and_dtypes(self, teacher: Teacher, images: Tensor) -> None:
        tokens_BD = teacher.extract_features(images)
        map_BDhw = teacher.extract_feature_map(images)
        assert tokens_BD.shape == (3, 128)
        assert map_BDhw.shape == (3, 128, 14, 14)
        assert tokens_BD.dtype == map_BDhw.dtype == torch.float32
        assert getattr(teacher, "dtype", None) == torch.float32
        rule = getattr(teacher, "preprocessing", None)
        assert rule.size == (224, 224) if isinstance(rule, Preprocessing) else isinstance(teacher, FakeTeacher)

    def test_everything_in_one_pass(self, teacher: Teacher, images: Tensor) -> None:
        features = teacher.extract(images, EVERYTHING)
        assert {name: list(tensor.shape) for name, tensor in features.named()} == {
            "cls": [3, 128],
            "feature_map": [3, 128, 14, 14],
            "registers": [3, 4, 128],
            "layers.0": [3, 128, 14, 14],
            "layers.-1": [3, 128, 14, 14],
        }
        assert len(features) == 3
        assert features.fingerprint
        assert features.cls is not None
        assert torch.equal(features.cls, teacher.extract_features(images))

    @pytest.mark.parametrize(("dtype", "expected"), [("float16", torch.float16), ("int8", torch.float32)])
    def test_result_dtypes(self, teacher: Teacher, images: Tensor, dtype: str, expected: torch.dtype) -> None:
        spec = FeatureSpec(feature_map=True, map_size=(5, 20), dtype=dtype)  # type: ignore[arg-type]
        map_BDhw = teacher.extract(images, spec).feature_map
        assert map_BDhw is not None
        assert map_BDhw.dtype == expected
        assert map_BDhw.shape == (3, 128, 5, 20)

    def test_takes_every_layout(self, teacher: Teacher, images: Tensor) -> None:
        expected = teacher.extract_features(images[:1])
        assert torch.equal(teacher.extract_features(images[0]), expected)
        assert torch.equal(teacher.extract_features(images[:1].numpy()), expected)
        assert torch.equal(teacher.extract_features([images[0]]), expected)
        assert torch.equal(teacher.extract_features([np.ascontiguousarray(images[0].numpy())]), expected)
        mixed = teacher.extract_features([images[0], images[1, :, :40, :50]])
        assert mixed.shape == (2, 128)

    def test_results_may_be_saved_for_backward_and_written_to(self, teacher: Teacher, images: Tensor) -> None:
        target = teacher.extract_features(images)
        student = torch.zeros_like(target, requires_grad=True)
        torch.nn.functional.mse_loss(student, target).backward()
        assert student.grad is not None
        before = teacher.extract_features(images)
        target.zero_()
        assert torch.equal(teacher.extract_features(images), before), "results share memory"

    def test_results_are_ordinary_tensors_even_in_inference_mode(self, teacher: Teacher, images: Tensor) -> None:
        with torch.inference_mode():
            tokens_BD = teacher.extract_features(images)
            features = teacher.extract(images, FeatureSpec(feature_map=True, dtype="int8"))
        assert not tokens_BD.is_inference()
        assert features.feature_map is not None
        assert not features.feature_map.is_inference()

    def test_images_are_left_alone(self, teacher: Teacher, images: Tensor) -> None:
        before = images.clone()
        teacher.extract(images, EVERYTHING)
        assert torch.equal(images, before)

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (torch.zeros(0, 3, 64, 64), "at least one image"),
            (torch.zeros(2, 2, 64, 64), "3 channels"),
            (torch.zeros(1, 3, 8, 64), "at least 16 pixels"),
            (torch.zeros(1, 3, 64, 64, dtype=torch.int32), "uint8"),
            (torch.zeros(64, 64), r"\[B,3,H,W\]"),
            ([], "at least one image"),
        ],
    )
    def test_bad_images(self, teacher: Teacher, images: Tensor, bad: Tensor, message: str) -> None:
        with pytest.raises(InputError, match=message):
            teacher.extract_features(bad)
        assert teacher.extract_features(images).shape == (3, 128), "it goes on serving"

    def test_bad_specs(self, teacher: Teacher, images: Tensor) -> None:
        with pytest.raises(SpecError, match="at least one of"):
            teacher.extract(images, FeatureSpec())
        with pytest.raises(SpecError, match=r"-3\.\.2"):
            teacher.extract(images, FeatureSpec(layers=(3,)))
        with pytest.raises(SpecError, match="twice"):
            teacher.extract(images, FeatureSpec(layers=(2, -1)))
