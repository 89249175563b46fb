"""The options that recipes take and refuse; and the teacher's outputs and size that they mean, in ``prefetch``."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from dinov3_ray import FeatureSpec
from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training import recipes
from dinov3_ray.training.prefetch import prefetch


def test_a_part_of_weight_0_is_left_out() -> None:
    def losses_of(recipe: recipes.Recipe) -> list[str]:
        student = nn.Sequential(nn.Conv2d(3, 8, 32, 32), nn.Conv2d(8, 8, 1))
        distiller = recipe.for_student(student, FakeTeacher(), torch.rand(1, 3, 64, 64))
        return [each.kind for each in distiller.terms.losses]

    assert losses_of(recipes.am_radio(smooth_l1=0)) == ["cls_cosine", "cosine"]
    assert losses_of(recipes.am_radio(cosine=0)) == ["cls_cosine", "smooth_l1"]
    assert losses_of(recipes.am_radio(cosine=0, smooth_l1=0)) == ["cls_cosine"]
    assert losses_of(recipes.lightly(local_weight=0)) == ["cls_queue"]
    assert recipes.lightly(local_weight=0).spec == FeatureSpec(cls=True), "nothing is asked for that is not compared"


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (recipes.am_radio, "smooth_l1", -0.1),
        (recipes.am_radio, "cosine", "much"),
        (recipes.am_radio, "hidden", 0),
        (recipes.lightly, "local_weight", -1),
        (recipes.lightly, "queue", 0),
        (recipes.lightly, "queue", 1.5),
        (recipes.lightly, "temperature", 0),
        (recipes.rtdetrv4, "share", 1.5),
        (recipes.rtdetrv4, "share", 0),
        *[
            (getattr(recipes, name), option, value)
            for name in recipes.names()
            for option, value in (("weight", -1), ("weight", None), ("schedule", 5))
        ],
    ],
)
def test_options_that_cannot_be_meant_are_refused_by_the_recipe(make: Any, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{option} must be an? .*; got {value!r}$"):
        make(**{option: value})


def test_prefetch_takes_the_spec_from_the_recipe() -> None:
    batches = [torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)] * 2
    stream = prefetch(FakeTeacher(), batches, recipe="am_radio")
    for _, targets in stream:
        assert targets.cls is not None
        assert targets.feature_map is not None
    assert prefetch(FakeTeacher(), batches, recipe=recipes.gram(weight=3.0))
    with pytest.raises(ConfigError, match="one of the two; got neither"):
        prefetch(FakeTeacher(), batches)
    with pytest.raises(ConfigError, match=r"one of the two; got spec=.* and recipe='gram'"):
        prefetch(FakeTeacher(), batches, FeatureSpec(feature_map=True), recipe="gram")


@pytest.mark.parametrize(("size", "said"), [(None, 0), ((64, 96), 0), ((32, 48), 1), ((224, 224), 1)])
def test_a_teacher_of_another_image_size_is_said_once(size: tuple[int, int] | None, said: int) -> None:
    batches = [torch.zeros(2, 3, 64, 96, dtype=torch.uint8)] * 3
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        list(prefetch(FakeTeacher(image_size=size), batches, recipe="gram"))
    messages = [str(each.message) for each in seen if "recipe" in str(each.message)]
    assert len(messages) == said
    assert all("views of 64 x 96 px" in each and "DinoV3Config(root, image_size='input')" in each for each in messages)


@pytest.mark.parametrize(
    ("teacher_size", "view", "patch_size", "meant"),
    [
        ((160, 160), (336, 336), 16, None),  # half of it, in whole patches
        ((168, 168), (336, 336), 16, "160 x 160"),
        ((84, 84), (336, 336), 16, "160 x 160"),
        ((168, 168), (336, 336), 14, None),
        ((320, 320), (641, 650), 16, None),
        ((320, 325), (641, 650), 16, "320 x 320"),
        ("input/2", (641, 650), 16, None),
        ("input", (641, 650), 16, "320 x 320"),
    ],
)
def test_half_the_view_is_in_whole_patches(teacher_size: Any, view: Any, patch_size: int, meant: str | None) -> None:
    said = recipes.rtdetrv4().misfit(teacher_size, view, patch_size)
    if meant is None:
        assert said is None
    else:
        assert f"recipe 'rtdetrv4' means 'input/2', which is {meant} px here" in str(said)


def test_a_teacher_that_sees_half_of_the_view_is_said_where_all_is_meant() -> None:
    recipe = recipes.gram()
    assert "at input/2, and recipe 'gram' means 'input', which is 640 x 640 px" in str(
        recipe.misfit("input/2", (641, 650))
    )
    for fits in ("input", (640, 640), (641, 650)):
        assert recipe.misfit(fits, (641, 650)) is None
    assert recipe.misfit((320, 320), (641, 650)) is not None


@pytest.mark.parametrize(("size", "patch_size", "said"), [((32, 48), 16, 0), ((28, 42), 14, 0), ((64, 96), 16, 1)])
def test_the_patch_of_the_teacher_is_taken_into_account(size: tuple[int, int], patch_size: int, said: int) -> None:
    batches = [torch.zeros(2, 3, 64, 96, dtype=torch.uint8)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        list(prefetch(FakeTeacher(image_size=size, patch_size=patch_size), batches, recipe="rtdetrv4"))
    assert len([each for each in seen if "recipe" in str(each.message)]) == said


def test_an_empty_first_batch_is_the_same_error_with_a_recipe() -> None:
    for what in ({"recipe": "gram"}, {"spec": FeatureSpec(feature_map=True)}):
        with pytest.raises(InputError, match="images must hold at least one image; got an empty sequence"):
            list(prefetch(FakeTeacher(image_size=(32, 32)), [[]], images=lambda batch: batch, **what))  # type: ignore[arg-type]
