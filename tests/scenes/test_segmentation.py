"""The probe and its measure, against what can be counted by hand."""

from __future__ import annotations

import pytest
import torch

from dinov3_ray.errors import InputError
from dinov3_ray.scenes.drawing import CLASSES
from dinov3_ray.scenes.segmentation import CELLS_PER_PATCH, mean_iou, predict_by_probe


def test_mean_iou_is_that_of_a_hand_computation() -> None:
    labels = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 2]])
    predicted = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 2]])
    # Class 0: 2 of 4 in either; class 1: 2 of 4; class 2: 2 of 2; classes 3 and 4 are nowhere, and do not count.
    assert mean_iou(predicted, labels) == pytest.approx((2 / 4 + 2 / 4 + 1) / 3)
    assert mean_iou(labels, labels) == 1.0
    # What is predicted where it never is counts with 0.
    assert mean_iou(torch.tensor([3, 0]), torch.tensor([0, 0])) == pytest.approx((1 / 2 + 0) / 2)


def test_mean_iou_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="predicted must have the shape of the labels"):
        mean_iou(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(InputError, match="at least one cell"):
        mean_iou(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


@pytest.mark.slow
def test_the_probe_finds_what_is_in_a_map_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    labels_Syx = torch.randint(len(CLASSES), (10, 8, 8), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels_Syx, len(CLASSES)).permute(0, 3, 1, 2).float()
    map_SChw = torch.nn.functional.pixel_unshuffle(one_hot, CELLS_PER_PATCH)
    knowing = predict_by_probe(map_SChw, labels_Syx, map_SChw)
    assert mean_iou(knowing, labels_Syx) > 0.99
    assert torch.equal(knowing, predict_by_probe(map_SChw, labels_Syx, map_SChw)), "the same every time"
    # The units of a channel do not matter.
    assert torch.equal(knowing, predict_by_probe(5 + 100 * map_SChw, labels_Syx, 5 + 100 * map_SChw))
    noise = torch.randn(10, 4, 2, 2, generator=generator)
    assert mean_iou(predict_by_probe(noise, labels_Syx, noise), labels_Syx) < 0.5


def test_the_probe_draws_none_of_the_random_numbers_of_the_process() -> None:
    maps, labels = torch.zeros(2, 3, 1, 1), torch.zeros(2, CELLS_PER_PATCH, CELLS_PER_PATCH, dtype=torch.int64)
    before = torch.get_rng_state()
    predict_by_probe(maps, labels, maps)
    assert torch.equal(torch.get_rng_state(), before), "another thread that has set a seed would get other weights"
