"""What goes into a teacher and what comes out of it, looked at without delaying either.

Nothing here waits for an accelerator, except for one look at images that are on it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov3_ray.errors import InputError, NumericsError
from dinov3_ray.features import Features
from dinov3_ray.images import ImageBatch, Images, find_pixel_fault

__all__ = ["TeacherWatch", "check_finite", "has_only_finite", "sums_are_finite", "unwatched"]

_BATCHES = 8  # of images that are looked at; a loader gives all of them in one convention

_watching = ContextVar("dinov3_watching", default=True)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Within it, watches see nothing: for a caller that looks at images and results itself."""
    token = _watching.set(False)
    try:
        yield
    finally:
        _watching.reset(token)


class TeacherWatch:
    """One teacher's watch: over the pixels of its first images, and over all of its results."""

    def __init__(self) -> None:
        self._batches_left = _BATCHES
        self._on_their_way: deque[_Look] = deque()

    def images(self, batch: ImageBatch) -> None:
        """Warn once if an image of the first batches is not in a teacher's convention; later batches cost nothing.

        It is a warning: any floats are computed as they are.
        """
        if not self._batches_left or not _watching.get():
            return
        # On an accelerator, a look waits for all work that is queued there: one batch must be enough.
        self._batches_left = self._batches_left - 1 if batch.tensors[0].device.type == "cpu" else 0
        fault = find_pixel_fault(batch.tensors)
        if fault is not None:
            self._batches_left = 0
            warnings.warn(fault, UserWarning, stacklevel=3)

    def results(self, features: Features, images: Images | ImageBatch) -> None:
        """Refuse results that are not finite.

        Those on a CUDA device are not waited for: they are refused in a later call, as soon as they are computed.

        Raises:
            InputError: the images hold values that are not finite.
            NumericsError: the results do: those of ``features``, or of an earlier call.
        """
        if not _watching.get():
            return
        while self._on_their_way and self._on_their_way[0].arrived:
            self._on_their_way.popleft().check()
        devices = {tensor.device for _, tensor in features.named()}
        if len(devices) == 1 and next(iter(devices)).type == "cuda":
            self._on_their_way.append(_Look.begin(features))
        else:
            check_finite(features, images)

    def __reduce__(self) -> tuple[type[TeacherWatch], tuple[()]]:
        return TeacherWatch, ()  # a copy starts anew: what is on its way is the original's


@dataclass(frozen=True, slots=True)
class _Look:
    """Whether results are finite, on its way from their device to ``finite`` on the host, until ``event``."""

    names: tuple[str, ...]
    finite: Tensor
    event: Any

    @classmethod
    def begin(cls, features: Features) -> _Look:
        device = next(tensor.device for _, tensor in features.named())
        with torch.cuda.device(device):  # pinned memory and events belong to the current one
            finite = sums_are_finite(features)
            host = torch.empty(finite.shape, dtype=finite.dtype, pin_memory=True)
            host.copy_(finite, non_blocking=True)
            event: Any = torch.cuda.Event  # its annotations are partial
            done = event()
            done.record()
        return cls(tuple(name for name, _ in features.named()), host, done)

    @property
    def arrived(self) -> bool:
        return bool(self.event.query())

    def check(self) -> None:
        for name, finite in zip(self.names, self.finite.tolist(), strict=True):
            if not finite:
                raise _not_finite(f"{name} of an earlier batch")


def check_finite(features: Features, images: Images | ImageBatch) -> None:
    """Look at every output; on an accelerator, wait for it.

    Raises:
        InputError: the images hold values that are not finite.
        NumericsError: the images are finite, and the results are not.
    """
    for name, tensor in features.named():
        if _is_finite(tensor):
            continue
        # Looked at only now: the caller's fault, or the device's?
        with contextlib.suppress(InputError):  # a teacher of the user's may take other images than ours
            if not all(map(_is_finite, ImageBatch.of(images).tensors)):
                break
        raise _not_finite(name)
    else:
        return
    raise InputError("images must be finite; these hold values that are not (NaN or infinite)")


def has_only_finite(features: Features) -> bool:
    """Whether all values are finite; on an accelerator, waits for it."""
    return all(_is_finite(tensor) for _, tensor in features.named())


def sums_are_finite(features: Features) -> Tensor:
    """bool [outputs], on the features' device, without a wait: False calls for :func:`check_finite`."""
    return torch.stack([torch.isfinite(_sum(tensor)) for _, tensor in features.named()])


def _not_finite(what: str) -> NumericsError:
    return NumericsError(
        f"the teacher's output {what} has values that are not finite (NaN or infinite): they overflow float16, which "
        "ends at 65504 (let the teacher compute in bfloat16 or float32, and FeatureSpec.dtype be one of them), or the "
        "weights are damaged"
    )


def _is_finite(tensor: Tensor) -> bool:
    # What looks wrong is looked at again, value by value.
    return not tensor.is_floating_point() or bool(torch.isfinite(_sum(tensor))) or bool(torch.isfinite(tensor).all())


def _sum(tensor: Tensor) -> Tensor:
    # A sum is not finite if any part is not, and is read at memory speed. The other way round only float16 sums can
    # overflow in practice; float32 holds those.
    return tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)
