"""The images of one forward pass, and what is to hold of its results. Pure tensor work, no queue and no thread."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dinov3_ray.errors import DinoV3Error, InputError, NumericsError
from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.pool.messages import TeacherInfo
from dinov3_ray.teacher import Extractor

__all__ = ["check_finite", "describe", "extract", "join", "pad", "sums_are_finite"]


def describe(teacher: Extractor) -> TeacherInfo:
    """What clients need to know of ``teacher``, as far as it says; proves it first if it can be proved.

    Raises:
        NumericsError: the teacher's fast path does not agree with plain float32.
    """
    prove = getattr(teacher, "prove", None)
    cosine = prove() if callable(prove) else None
    told: dict[str, Any] = {name: getattr(teacher, name, None) for name in TeacherInfo.__dataclass_fields__}
    told = {name: value for name, value in told.items() if value is not None}
    for name in ("dtype", "device"):
        if name in told:
            told[name] = str(told[name])
    return replace(TeacherInfo(**told), description=type(teacher).__name__, golden_cosine=cosine)


def join(batches: list[ImageBatch]) -> ImageBatch:
    """Several requests' images as one batch; a single one is not copied."""
    if len(batches) == 1:
        return batches[0]
    if batches[0].stacked is None:
        return ImageBatch(stacked=None, ragged=tuple(image for batch in batches for image in batch.ragged))
    return ImageBatch(stacked=torch.cat([batch.tensors[0] for batch in batches]))


def pad(batch: ImageBatch, size: int) -> ImageBatch:
    """``batch`` with its first image repeated up to ``size`` images."""
    missing = size - len(batch)
    if missing <= 0:
        return batch
    first = batch.rows(0, 1)
    return join([batch, *[first] * missing])


def extract(teacher: Extractor, batch: ImageBatch, spec: FeatureSpec) -> Features:
    """One forward pass, in the compute dtype.

    Raises:
        DinoV3Error: the teacher gave features of another number of images.
        Exception: whatever the teacher raises.
    """
    images = batch.tensors[0] if batch.stacked is not None else batch.ragged
    features = teacher.extract(images, spec.native())
    if len(features) != len(batch):
        raise DinoV3Error(f"the teacher gave features of {len(features)} images for a batch of {len(batch)}")
    return features


def check_finite(features: Features, batch: ImageBatch) -> None:
    """Look at every output.

    Raises:
        InputError: the images hold values that are not finite.
        NumericsError: the images are finite, and the results are not.
    """
    for name, tensor in features.named():
        if is_finite(tensor):
            continue
        # Looked at only now: the caller's fault, or the device's?
        if not all(is_finite(images) for images in batch.tensors if images.is_floating_point()):
            raise InputError("images must be finite; these hold values that are not (NaN or infinite)")
        raise NumericsError(f"the teacher's output {name} has values that are not finite (NaN or infinite)")


def is_finite(tensor: Tensor) -> bool:
    # What looks wrong is looked at again, value by value.
    return bool(torch.isfinite(_sum(tensor))) or bool(torch.isfinite(tensor).all())


def sums_are_finite(features: Features) -> Tensor:
    """bool [outputs], on the features' device, without a wait: False calls for :func:`check_finite`."""
    return torch.stack([torch.isfinite(_sum(tensor)) for _, tensor in features.named()])


def _sum(tensor: Tensor) -> Tensor:
    # A sum is not finite if any part is not, and is read at memory speed. The other way round only float16 sums can
    # overflow in practice; float32 holds those.
    return tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)
