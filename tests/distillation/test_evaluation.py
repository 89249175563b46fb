"""How well features tell classes apart: against a computation by hand, and against scikit-learn where it is there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_ray.distillation.evaluation import (
    LabelledPictures,
    knn_accuracy,
    linear_accuracy,
    score,
    teacher_features,
)
from dinov3_ray.errors import ConfigError, InputError
from dinov3_ray.testing import FakeTeacher


def unit(degrees: float, length: float = 1.0) -> list[float]:
    return [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))]


def test_neighbours_vote_by_their_cosine() -> None:
    seen = torch.tensor([unit(0, 5), unit(12), unit(14), unit(90, 0.1)], dtype=torch.float64)
    classes = torch.tensor([0, 1, 1, 0])
    unseen = torch.tensor([unit(2, 9), unit(80)], dtype=torch.float64)

    def vote(degrees: float) -> float:
        return math.exp(math.cos(math.radians(degrees)) / 0.07)

    # The first is nearest to one of class 0, and two of class 1 are a little farther away: by hand, 1 wins together.
    assert vote(2) < vote(10) + vote(12)
    assert vote(10) > vote(68) + vote(66)
    assert knn_accuracy(seen, classes, unseen, torch.tensor([1, 0]), k=3) == 1.0
    assert knn_accuracy(seen, classes, unseen, torch.tensor([0, 0]), k=1) == 1.0
    assert knn_accuracy(seen, classes, unseen, torch.tensor([0, 1]), k=3) == 0.0
    assert knn_accuracy(seen, classes, unseen, torch.tensor([1, 0])) == 1.0  # 20 neighbours of 4


@pytest.mark.slow
def test_the_linear_probe_is_the_regression_that_it_says() -> None:
    chance = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 6, generator=chance, dtype=torch.float64)
    truth = torch.arange(240) % 3
    vectors = 40 * (centres[truth] + 0.7 * torch.randn(240, 6, generator=chance, dtype=torch.float64)) + 7
    seen, unseen = slice(0, 160), slice(160, 240)
    found = linear_accuracy(vectors[seen], truth[seen], vectors[unseen], truth[unseen])

    # The same minimum, by plain gradient descent.
    mean, std = vectors[seen].mean(0), vectors[seen].std(0)
    inputs = (vectors - mean) / std
    weight, bias = torch.zeros(6, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(3000):
        error = (inputs[seen] @ weight + bias).softmax(1) - torch.eye(3, dtype=torch.float64)[truth[seen]]
        weight -= 0.5 * (inputs[seen].T @ error / 160 + 1e-3 * weight)
        bias -= 0.5 * error.mean(0)
    told = (inputs[unseen] @ weight + bias).argmax(1)
    assert found == (told == truth[unseen]).double().mean().item()
    assert 0.6 < found < 1.0
    assert linear_accuracy(vectors[:1], truth[:1], vectors[1:2], truth[:1]) == 1.0  # one row has no deviation


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes that differ in brightness, one image of which cannot be read."""
    chance = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 120)):
        (tmp_path / name / "more").mkdir(parents=True)
        for number in range(7):
            pixels = chance.integers(low, low + 100, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / ("more" if number % 2 else "") / f"{number}.png")
    (tmp_path / "dark" / "0.png").write_bytes(b"x")
    return tmp_path


def test_a_folder_of_each_class_is_split_and_scored(classes: Path) -> None:
    labelled = LabelledPictures(classes, (16, 24))
    batches = labelled.batches(4, workers=0)
    assert labelled.classes == ["dark", "light"]
    assert [len(images) for images, _ in batches] == [4, 4, 4, 2]
    assert sum((labels == -1).sum().item() for _, labels in batches) == 1
    brightness = score(lambda images: images.float().mean((2, 3)) - 110, batches)
    assert (brightness.knn, brightness.linear) == (1.0, 1.0)
    useless = score(lambda images: torch.ones(len(images), 2), batches)
    assert useless.knn == 0.5
    assert teacher_features(FakeTeacher(), batches).linear == 1.0


def test_classes_that_cannot_be_read_are_told(classes: Path) -> None:
    for path in (classes / "dark").rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"at least two classes with images that can be read.*7 of 14 images"):
        score(lambda images: torch.ones(len(images), 2), LabelledPictures(classes, (16, 16)).batches(4, workers=0))


def test_scores_of_other_images_are_refused(classes: Path) -> None:
    labelled = LabelledPictures(classes, (16, 24))
    before = labelled.describe()
    labelled.check_same(None, classes)
    labelled.check_same({**before, "folder": "where/it/was"}, classes)
    Image.new("RGB", (20, 20)).save(classes / "light" / "new.png")
    words = rf"scored on before, {classes} \(14 images\), as it was then; got {classes} \(15 images\)"
    with pytest.raises(ConfigError, match=words):
        LabelledPictures(classes, (16, 24)).check_same(before, classes)


def test_folders_that_are_no_classes_are_refused(classes: Path) -> None:
    (classes / "light").rename(classes / "dark" / "light")
    with pytest.raises(InputError, match="at least two classes; it has dark"):
        LabelledPictures(classes, (16, 16))
    Image.new("RGB", (20, 20)).save(classes / "alone.png")
    with pytest.raises(InputError, match=r"a folder for each class; alone\.png lies in none"):
        LabelledPictures(classes, (16, 16))
    (classes / "single").mkdir()
    (classes / "alone.png").rename(classes / "single" / "alone.png")
    with pytest.raises(InputError, match="at least two images of each class; 'single' has one"):
        LabelledPictures(classes, (16, 16))
