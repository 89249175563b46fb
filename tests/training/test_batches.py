"""Finding the images in a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dinov3_ray.errors import ConfigError
from dinov3_ray.training.prefetch import find_images


@pytest.mark.parametrize(
    "batch",
    [
        (image := torch.zeros(2, 3, 32, 32)),
        image.numpy(),
        {"img": image, "cls": torch.zeros(2)},
        {"pixel_values": image},
        (image, torch.zeros(2)),
        [{"images": image}, "rest"],
        [image[0], torch.zeros(3, 16, 16)],
        ((image[0], image[1]), ({"boxes": 1}, {"boxes": 2})),
    ],
)
def test_images_are_found(batch: Any) -> None:
    found = find_images(batch)
    assert np.shape(found[0]) == (3, 32, 32)


@pytest.mark.parametrize(
    "batch", [{"x": image}, {"img": image, "images": image}, (torch.zeros(2), image), [], "img", 3, (image[0], 1)]
)
def test_images_that_cannot_be_found(batch: Any) -> None:
    with pytest.raises(ConfigError, match="images must be given"):
        find_images(batch)
