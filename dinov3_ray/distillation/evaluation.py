"""How well features tell classes apart: by their nearest neighbours, and by a linear probe.

Shapes: N images, D channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, SequentialSampler

from dinov3_ray.datasets.decode import Unreadable
from dinov3_ray.distillation.augmentation import crop_centre
from dinov3_ray.distillation.view_order import Pictures, load_batches
from dinov3_ray.errors import ConfigError, InputError, SpecError
from dinov3_ray.features import FeatureSpec
from dinov3_ray.teacher import Extractor
from dinov3_ray.training.prefetch import prefetch

__all__ = ["LabelledPictures", "Scores", "knn_accuracy", "linear_accuracy", "score", "teacher_features"]

_NEIGHBOURS = 20
_TEMPERATURE = 0.07
_HELD_OUT = 5  # of each class, one image of so many is not seen
_DECAY = 1e-3
_ITERATIONS = 200
_UNREADABLE = -1


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares, 0 to 1, of the held-out images whose class was predicted."""

    knn: float
    linear: float


class LabelledPictures(Dataset[tuple[Tensor, int]]):
    """The images of a folder that has a folder for each class: central crops, uint8 [3,H,W], and their class.

    Args:
        folder: its subfolders are the classes; theirs belong to them.
        size: (H, W) of the crops.

    Raises:
        StoreError: nothing is there.
        InputError: it has fewer than two classes, an image outside of them, or a class with one image.
    """

    def __init__(self, folder: str | os.PathLike[str], size: tuple[int, int]) -> None:
        self.folder, self.pictures, self.size = os.fspath(folder), Pictures.open(folder), size
        names = [self.pictures.name(index) for index in range(len(self.pictures))]
        outside = [name for name in names if len(PurePosixPath(name).parts) < 2]
        if outside:
            raise InputError(f"evaluate must be a folder with a folder for each class; {outside[0]} lies in none")
        folders = [PurePosixPath(name).parts[0] for name in names]
        self.classes = sorted(set(folders))
        if len(self.classes) < 2:
            raise InputError(f"evaluate must be a folder with at least two classes; it has {', '.join(self.classes)}")
        few = [name for name in self.classes if folders.count(name) < 2]
        if few:
            raise InputError(f"evaluate must have at least two images of each class; {few[0]!r} has one")
        self.labels = [self.classes.index(name) for name in folders]

    def describe(self) -> dict[str, Any]:
        """Where they are, and what distinguishes them from others; as JSON values."""
        return {"folder": self.folder, **self.pictures.describe()}

    def check_same(self, before: Mapping[str, Any] | None, out: Path) -> None:
        """Raise ConfigError if the run in ``out`` was scored on others: of two sets, scores do not belong together.

        Args:
            before: how those describe themselves; None if there are none.
        """
        now = self.describe()
        if before is not None and before["listing"] != now["listing"]:
            was, is_ = (f"{each['folder']} ({each['images']} images)" for each in (before, now))
            raise ConfigError(
                f"evaluate must be what {out} was scored on before, {was}, as it was then; got {is_}, whose names or "
                "sizes differ (choose another out for it)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self.pictures.read(index)
        if isinstance(picture, Unreadable):
            return torch.full((3, *self.size), 127, dtype=torch.uint8), _UNREADABLE
        return crop_centre(picture, self.size), self.labels[index]

    def batches(self, batch: int, workers: int) -> Any:
        """A loader of (images [B,3,H,W], classes [B]); the class of what cannot be read is -1."""
        steps = BatchSampler(SequentialSampler(self), batch, drop_last=False)
        return load_batches(self, steps, _collate, self.pictures, workers=workers)


def _collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def score(features: Callable[[Tensor], Tensor], batches: Any) -> Scores:
    """The scores of what ``features`` makes of images uint8 [B,3,H,W]: vectors [B, D], on any device.

    Args:
        batches: as :meth:`LabelledPictures.batches` gives them.

    Raises:
        InputError: the images that can be read are too few, or of one class.
    """
    return _score((features(images), labels) for images, labels in batches)


def teacher_features(teacher: Extractor, batches: Any) -> Scores:
    """The scores of a teacher's CLS tokens, or of the means of its maps where it has none."""
    try:
        return _score(_tokens(teacher, batches, FeatureSpec(cls=True, dtype="float32")))
    except SpecError:
        return _score(_tokens(teacher, batches, FeatureSpec(feature_map=True, dtype="float32")))


def _tokens(teacher: Extractor, batches: Any, spec: FeatureSpec) -> Iterator[tuple[Tensor, Tensor]]:
    for (_, labels), targets in prefetch(teacher, batches, spec, images=lambda batch: batch[0]):
        if targets.cls is not None:
            yield targets.cls, labels
        else:
            assert targets.feature_map is not None
            yield targets.feature_map.mean((2, 3)), labels


def _score(batches: Iterator[tuple[Tensor, Tensor]]) -> Scores:
    features, labels = [], []
    for vectors_BD, labels_B in batches:
        features.append(vectors_BD.detach().cpu().double())
        labels.append(labels_B)
    features_ND, labels_N = torch.cat(features), torch.cat(labels)
    readable = labels_N != _UNREADABLE
    features_ND, labels_N = features_ND[readable], labels_N[readable]
    held_N, classes = _held_out(labels_N), len(set(labels_N.tolist()))
    if classes < 2 or not held_N.any():
        raise InputError(
            "evaluate must have at least two classes with images that can be read, and two of them in one class; "
            f"{len(labels_N)} of {len(readable)} images can be read, of classes: {classes}"
        )
    seen, unseen = (features_ND[~held_N], labels_N[~held_N]), (features_ND[held_N], labels_N[held_N])
    return Scores(knn_accuracy(*seen, *unseen), linear_accuracy(*seen, *unseen))


def _held_out(labels_N: Tensor) -> Tensor:
    """Of each class, in its order, every fifth image, or the last of fewer; none of a class of one."""
    held_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in set(labels_N.tolist()):
        of_class = (labels_N == label).nonzero().flatten()
        if len(of_class) > 1:
            held_N[of_class[_HELD_OUT - 1 :: _HELD_OUT] if len(of_class) >= _HELD_OUT else of_class[-1:]] = True
    return held_N


def knn_accuracy(
    seen_ND: Tensor, classes_N: Tensor, unseen_MD: Tensor, truth_M: Tensor, *, k: int = _NEIGHBOURS
) -> float:
    """The share of ``unseen`` vectors whose class their ``k`` nearest neighbours predict; a vote weighs exp(cos/0.07).

    Source: Wu et al. (arXiv 1805.01978), as in DINO's evaluation (arXiv 2104.14294), with k = 20.
    """
    cosines_MN = F.normalize(unseen_MD, dim=1) @ F.normalize(seen_ND, dim=1).T
    nearest_Mk, which_Mk = cosines_MN.topk(min(k, len(seen_ND)), dim=1)
    votes_MC = torch.zeros(len(unseen_MD), int(classes_N.max()) + 1, dtype=cosines_MN.dtype)
    votes_MC.scatter_add_(1, classes_N[which_Mk], (nearest_Mk / _TEMPERATURE).exp())
    return float((votes_MC.argmax(1) == truth_M).double().mean())


def linear_accuracy(seen_ND: Tensor, classes_N: Tensor, unseen_MD: Tensor, truth_M: Tensor) -> float:
    """The share of ``unseen`` vectors whose class a logistic regression on standardised ``seen`` ones predicts.

    It minimises the mean cross-entropy plus 0.001/2 · |W|², by L-BFGS from W = 0.
    """
    mean_D = seen_ND.mean(0)
    std_D = seen_ND.std(0, correction=min(1, len(seen_ND) - 1)).clamp_min(1e-6)  # of one row it is 0, not NaN
    seen_ND, unseen_MD = ((each - mean_D) / std_D for each in (seen_ND, unseen_MD))
    with torch.enable_grad():
        weight_CD = torch.zeros(int(classes_N.max()) + 1, seen_ND.shape[1], dtype=seen_ND.dtype, requires_grad=True)
        bias_C = torch.zeros(len(weight_CD), dtype=seen_ND.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight_CD, bias_C], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(seen_ND @ weight_CD.T + bias_C, classes_N) + _DECAY / 2 * weight_CD.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    told_M = (unseen_MD @ weight_CD.detach().T + bias_C.detach()).argmax(1)
    return float((told_M == truth_M).double().mean())
