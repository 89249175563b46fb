"""Images in another convention than a teacher expects: one warning, wherever they enter, and none for right ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov3_ray import DinoV3Config, DinoV3Teacher, FeatureSpec, TeacherPool
from dinov3_ray.images import ImageBatch, find_pixel_fault
from dinov3_ray.teacher import Teacher
from dinov3_ray.testing import FakeTeacher
from dinov3_ray.training.prefetch import prefetch
from dinov3_ray.watch import TeacherWatch

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
CAFFE = torch.tensor([123.7, 116.8, 103.9])[:, None, None]


def random_images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 48, 64, generator=torch.Generator().manual_seed(0))


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "normalised": (lambda x: (x - MEAN) / STD, r"one reaches from -\d.* normalised already.*before Normalize"),
    "with mean and std 0.5": (lambda x: x * 2 - 1, r"\(images in \[-1, 1\]: pass \(x \+ 1\) / 2\)"),
    "0..255 without the mean": (lambda x: x * 255 - CAFFE, r"one reaches from -1\d\d .*normalised already"),
    "0..255": (lambda x: x * 255, r"one reaches 2\d\d: divide by 255, or pass uint8"),
    "0..65535": (lambda x: x * 65535, r"one reaches 6\d{4}: divide by the largest value"),
    "divided twice": (lambda x: x / 255, "one reaches 0.0039 only: divide by 255 once"),
    "0..1 cut to uint8": (lambda x: (x * 0.99).to(torch.uint8), "all of these are black: .*multiply them by 255"),
    "0..1 rounded to uint8": (lambda x: x.round().to(torch.uint8), "one reaches 1 only: .*multiply them by 255"),
}


@pytest.mark.parametrize(("convention", "fault"), WRONG.values(), ids=WRONG)
def test_each_wrong_convention_is_found_in_any_form(
    photographs: list[Tensor], convention: Callable[[Tensor], Tensor], fault: str
) -> None:
    images = convention(random_images())
    forms = [[images], list(images), [images.flip(-1)], [images.to(memory_format=torch.channels_last)]]
    forms.append([convention(photograph / 255) for photograph in photographs])
    if images.is_floating_point():
        forms.append([images.double()])
    if images.is_floating_point() and images.amax() < 60000:
        forms += [[images.half()], [images.bfloat16()]]
    for form in forms:
        assert re.search(fault, find_pixel_fault(form) or "nothing"), form[0].dtype


def test_what_is_right_is_not_complained_of(photographs: list[Tensor]) -> None:
    floats = [photograph / 255 for photograph in photographs]
    for right in (
        photographs,
        floats,
        [image + 0.05 * torch.randn_like(image) for image in floats],  # augmented, and not clamped
        [image * 1.5 for image in floats],
        [torch.nn.functional.interpolate(image[None], (99, 88), mode="bicubic")[0] for image in floats],
        [torch.zeros(3, 32, 32, dtype=torch.uint8), photographs[0]],  # one of them may be black
        [torch.zeros(2, 3, 32, 32)],
        [torch.ones(2, 3, 32, 32)],
        [torch.full((3, 32, 32), float("nan"))],  # refused elsewhere
        [torch.randn(4, 3, 512, 512)],  # the seed's snippet
        [torch.randn(3, 32, 32) * 100],
    ):
        assert find_pixel_fault(right) is None


def test_it_is_one_image_of_the_batch_that_shows_it() -> None:
    dark = random_images(8) * 0.02
    assert find_pixel_fault([dark]) is None
    dark[5] = random_images(1)[0] * 255
    assert "divide by 255" in (find_pixel_fault([dark]) or "")


def test_the_first_batches_are_looked_at_and_later_ones_cost_nothing() -> None:
    def seen(before: int) -> bool:
        watch = TeacherWatch()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(before):
                watch.images(ImageBatch.of(random_images()))
            for _ in range(3):
                watch.images(ImageBatch.of(random_images() * 255))
        assert len(caught) <= 1
        return bool(caught)

    assert [seen(before) for before in (0, 1, 3, 100)] == [True, True, True, False]


@pytest.fixture(params=["local", "fake", "local pool", "local pool of local teachers"])
def teacher(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Iterator[Teacher]:
    config = DinoV3Config(tiny_checkpoint, dtype="float32", image_size=64)
    if request.param == "local":
        yield DinoV3Teacher(config)
    elif request.param == "fake":
        yield FakeTeacher()
    else:
        source = FakeTeacher.factory() if request.param == "local pool" else config
        with TeacherPool.start(source, name="pixels", replicas=2, local_mode=True) as pool:
            yield pool.teacher()


def test_each_teacher_warns_once_in_the_callers_process(teacher: Teacher) -> None:
    wrong = (random_images() - MEAN) / STD
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for images in (wrong, wrong, wrong.numpy(), list(wrong)):
            assert teacher.extract_features(images).isfinite().all()  # a warning: nothing is refused
    assert ["normalised already" in str(each.message) for each in caught] == [True]


def test_a_prefetch_warns_too(teacher: Teacher) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in prefetch(teacher, [random_images() * 255] * 6, FeatureSpec(cls=True)):
            pass
    assert ["divide by 255" in str(each.message) for each in caught] == [True]


def test_right_images_pass_every_teacher_without_a_word(teacher: Teacher, photographs: list[Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in photographs[:3]:
            teacher.extract_features(image)
            teacher.extract_features(image / 255)
            teacher.extract_features(np.asarray(image[None]))
