"""What a feature map knows of the scenes: a linear probe for segmentation, and the mean IoU of what it predicts.

Shapes: S scenes, C channels, a grid of h × w patches, each of p × p cells; K classes; y = h·p, x = w·p.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_ray.errors import InputError
from dinov3_ray.scenes.drawing import CLASSES

__all__ = ["CELLS_PER_PATCH", "SegmentationHead", "mean_iou", "predict_by_probe"]

CELLS_PER_PATCH = 4
"""p: cells along a side of a patch of 16 pixels."""

_ITERATIONS = 60
_DECAY = 1e-3


class SegmentationHead(nn.Module):
    """A linear map from the C channels of a patch to the scores of the K classes in each of its cells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, len(CLASSES) * CELLS_PER_PATCH**2, 1)

    def forward(self, map_SChw: Tensor) -> Tensor:
        """[S,C,h,w] to scores [S,K,y,x]."""
        return F.pixel_shuffle(self.linear(map_SChw), CELLS_PER_PATCH)


def predict_by_probe(map_SChw: Tensor, labels_Syx: Tensor, unseen_SChw: Tensor) -> Tensor:
    """The classes, int64 [S',y,x], that a linear probe of frozen maps predicts where it was not fitted.

    The probe is a logistic regression on standardised channels, from zero, with a fixed number of steps of L-BFGS: the
    same for each map, whoever computed it.

    Args:
        map_SChw: float32, of the scenes with labels.
        labels_Syx: int64, theirs.
        unseen_SChw: of the scenes to predict.
    """
    mean_C = map_SChw.mean((0, 2, 3), keepdim=True)
    spread_C = map_SChw.std((0, 2, 3), keepdim=True) + 1e-4
    with torch.device("meta"):  # draws no weights: the process's random numbers may be another thread's just now
        head = SegmentationHead(map_SChw.shape[1])
    head.to_empty(device=map_SChw.device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    given = (map_SChw - mean_C) / spread_C
    fit = torch.optim.LBFGS(head.parameters(), max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        fit.zero_grad()
        penalty = head.linear.weight.square().sum() / CELLS_PER_PATCH**2 / len(CLASSES)
        value = F.cross_entropy(head(given), labels_Syx) + _DECAY * penalty
        torch.autograd.backward(value)
        return value

    fit.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        predicted: Tensor = head((unseen_SChw - mean_C) / spread_C).argmax(1)
    return predicted


def _confusion(predicted: Tensor, labels: Tensor, classes: int = len(CLASSES)) -> Tensor:
    """How many cells of each class (rows) were taken for each class (columns), int64 [K,K].

    Raises:
        InputError: the shapes differ.
    """
    if predicted.shape != labels.shape:
        raise InputError(
            f"predicted must have the shape of the labels; got {list(predicted.shape)} and {list(labels.shape)}"
        )
    pairs = labels.long() * classes + predicted.long()
    return torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes)


def mean_iou(predicted: Tensor, labels: Tensor, classes: int = len(CLASSES)) -> float:
    """The intersection over union of each class over all cells, and of these the mean: 0 to 1.

    Classes that are neither predicted nor there do not count.

    Raises:
        InputError: the shapes differ, or there is no cell.
    """
    counts_KK = _confusion(predicted, labels, classes).double()
    both_K = counts_KK.diag()
    either_K = counts_KK.sum(0) + counts_KK.sum(1) - both_K
    if not either_K.any():
        raise InputError("labels must hold at least one cell; got none")
    return float((both_K[either_K > 0] / either_K[either_K > 0]).mean())
