"""Many scenes under many lights, with the labels of their cells, as a segmentation is learned and measured on.

Shapes: S scenes of H × W pixels; y × x cells of 4 × 4 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ray.scenes.drawing import CLASSES, draw_labelled

__all__ = ["CELL", "Scenery", "draw_scenery", "relit"]

CELL = 4
"""Pixels per cell, each way: the resolution in which scenes are segmented."""

_HUE = math.pi / 4  # at most; a lake may look green, and a field blue, but hardly in the same scene
_BRIGHTNESS = 0.4  # in natural logarithms, at most
_TINT = 0.2  # of each channel, at most
_NOISE = 8.0  # standard deviation, of 0..255


@dataclass(frozen=True, slots=True, eq=False)
class Scenery:
    """Scenes and their labels.

    Attributes:
        pictures: uint8 RGB [S,3,H,W].
        labels: int64 [S,y,x], the class (of :data:`~dinov3_ray.scenes.drawing.CLASSES`) that most pixels of each cell
            have.
    """

    pictures: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, chosen: Tensor | slice) -> Scenery:
        return Scenery(self.pictures[chosen], self.labels[chosen])

    def turned(self, generator: torch.Generator) -> Scenery:
        """All turned by the same quarters, and mirrored or not, as ``generator`` decides."""
        quarters, mirrored = divmod(int(torch.randint(8, (1,), generator=generator)), 2)

        def turn(tensor: Tensor) -> Tensor:
            return (tensor.flip(-1) if mirrored else tensor).rot90(quarters, (-2, -1)).contiguous()

        return Scenery(turn(self.pictures), turn(self.labels))


def draw_scenery(first: int, count: int, side: int, on_scene: Callable[[], None] = lambda: None) -> Scenery:
    """The scenes ``first`` to ``first + count - 1``, each under a light of its own, which its number decides too.

    Args:
        first, count: the numbers of the scenes.
        side: H and W, a multiple of :data:`CELL`.
        on_scene: called after each, to stop by an exception.
    """
    pictures_S3HW = torch.empty(count, 3, side, side, dtype=torch.uint8)
    labels_Syx = torch.empty(count, side // CELL, side // CELL, dtype=torch.int64)
    for index in range(count):
        picture_3HW, labels_HW = draw_labelled(first + index, side)
        pictures_S3HW[index] = relit(picture_3HW, first + index)
        labels_Syx[index] = _of_cells(labels_HW)
        on_scene()
    return Scenery(pictures_S3HW, labels_Syx)


def relit(picture_3HW: Tensor, seed: int) -> Tensor:
    """``picture_3HW`` (uint8) in another light: hue, tint, brightness and noise, which ``seed`` decides."""
    chance = np.random.default_rng((seed, 1))
    turn, brightness, *tint = chance.uniform(-1, 1, 5)
    gains_3 = math.exp(_BRIGHTNESS * brightness) * (1 + _TINT * np.array(tint))
    matrix_33 = torch.from_numpy(gains_3[:, None] * _hue_turn(_HUE * turn)).float()
    lit_3HW = torch.einsum("ij,jhw->ihw", matrix_33, picture_3HW.float())
    noise_3HW = torch.from_numpy(chance.standard_normal(picture_3HW.shape, dtype=np.float32))
    return (lit_3HW + _NOISE * noise_3HW).round().clamp(0, 255).to(torch.uint8)


def _hue_turn(angle: float) -> np.ndarray:
    """The rotation of RGB about its grey axis (Rodrigues' formula), [3,3]."""
    cross_33 = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn_33: np.ndarray = math.cos(angle) * np.eye(3) + (1 - math.cos(angle)) / 3 + math.sin(angle) * cross_33
    return turn_33


def _of_cells(labels_HW: Tensor) -> Tensor:
    """The most frequent label of each cell, int64 [y,x]; of equally many, the first."""
    shares_Kyx = F.avg_pool2d(torch.stack([labels_HW == label for label in range(len(CLASSES))]).float(), CELL)
    return shares_Kyx.argmax(0)
