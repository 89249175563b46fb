"""Batches on a device whose memory may not suffice for them: computed in parts that fit, and joined again.

A batch that ran out of memory is computed with nothing else in flight: whole once more, then in halves, down to one
image. What fits is remembered: later batches of that kind are computed at once in parts of that size, one after the
other, since only that is known to fit; or whole and one after the other, if that is enough.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from dinov3_ray.errors import DeviceMemoryError, first_line
from dinov3_ray.features import FeatureSpec
from dinov3_ray.images import ImageBatch
from dinov3_ray.model.device import empty_cache
from dinov3_ray.pool.replica.device_fault import DeviceFault, device_fault, drop_frames
from dinov3_ray.pool.replica.device_pipeline import DevicePass, DevicePipeline, Results, pad_batch
from dinov3_ray.pool.replica.kind_limits import ImageKind, KindLimits

__all__ = ["FittingPipeline", "Parts"]

log = logging.getLogger("dinov3_ray")


@dataclass(frozen=True, slots=True)
class Parts:
    """A batch that was computed in parts.

    Attributes:
        results: of the whole batch.
        passes: forward passes that gave them.
        shortages: passes that ran out of memory before.
    """

    results: Results
    passes: int
    shortages: int


class FittingPipeline:
    """A device pipeline that takes batches of any size. One thread calls all of its methods.

    Args:
        name: the replica's, for messages.
        pipeline: runs the passes.
        pad_to: images to which each pass is padded; 1 pads nothing. The parts of a batch are padded to their size.
    """

    def __init__(self, name: str, pipeline: DevicePipeline, *, pad_to: int = 1) -> None:
        self._name = name
        self._pipeline = pipeline
        self._pad_to = pad_to
        self._most = KindLimits()  # images that fit with nothing else in flight
        self._alone = KindLimits()  # images from which on a batch fits with nothing else in flight only

    @property
    def depth(self) -> int:
        """How many passes may be in flight at once."""
        return self._pipeline.depth

    @property
    def fitting_batch(self) -> int:
        """Images in the smallest parts that batches are computed in; 0 if all batches so far fit whole."""
        return self._most.lowest() or 0

    def fits(self, batch: ImageBatch, spec: FeatureSpec) -> bool:
        """Whether ``batch`` may be computed whole, with others in flight."""
        alone = self._alone.of(ImageKind.of(batch, spec))
        return alone is None or self._whole(batch) < alone

    def begin(self, batch: ImageBatch, spec: FeatureSpec) -> DevicePass:
        """Begin the one pass of a batch that fits; errors as in :meth:`DevicePipeline.begin`."""
        return self._begin(batch, spec, self._whole(batch))

    def compute(self, batch: ImageBatch, spec: FeatureSpec, *, after_shortage: bool) -> Parts:
        """Compute a batch that may not fit, in parts; nothing else may be in flight.

        Args:
            after_shortage: it has just run out of memory.

        Raises:
            DeviceMemoryError: one image does not fit.
            Exception: as :meth:`DevicePass.result`, and whatever the teacher raises.
        """
        # The cache is emptied so that a large block can be had in one piece.
        kind, whole = ImageKind.of(batch, spec), self._whole(batch)
        size = min(whole, self._most.of(kind) or whole)
        parts: list[Results] = []
        start = shortages = 0
        if after_shortage:
            empty_cache()
        while start < len(batch):
            part = batch.rows(start, start + size)
            results = self._try(part, spec, size)
            if results is not None:
                parts.append(results)
                start += len(part)
            else:
                empty_cache()
                shortages += 1
                size = (size + 1) // 2
        self._remember(kind, whole, size)
        return Parts(_join(parts), len(parts), shortages)

    def warm_up(self, batch: ImageBatch, spec: FeatureSpec) -> int:
        """Compute ``batch`` as often at once as may be in flight later, so that all memory is there; or in parts.

        Returns:
            How many passes ran out of memory.

        Raises:
            Exception: as :meth:`compute`.
        """
        if not self.fits(batch, spec):
            return self.compute(batch, spec, after_shortage=False).shortages
        if self._rehearse(batch, spec):
            return 0
        return 1 + self.compute(batch, spec, after_shortage=True).shortages

    def _rehearse(self, batch: ImageBatch, spec: FeatureSpec) -> bool:
        """Whether as many passes as may be in flight at once fit."""
        begun: list[DevicePass] = []
        failures: list[Exception] = []
        try:
            for _ in range(self.depth):
                begun.append(self.begin(batch, spec))
        except Exception as error:  # noqa: BLE001 - raised again below, once the others have ended
            failures.append(error)
        for one in begun:
            try:
                one.result()
            except Exception as error:  # noqa: BLE001 - as above
                failures.append(error)
        for failure in failures:
            if device_fault(failure) is not DeviceFault.MEMORY:
                raise failure
            drop_frames(failure)
        return not failures

    def _try(self, part: ImageBatch, spec: FeatureSpec, size: int) -> Results | None:
        """The results of one pass of ``size`` images; None if they do not fit."""
        try:
            return self._begin(part, spec, size).result()
        except Exception as error:
            if device_fault(error) is not DeviceFault.MEMORY:
                raise
            if size > 1:
                drop_frames(error)
                return None
            height, width = part.tensors[0].shape[-2:]
            raise DeviceMemoryError(
                f"images must fit the memory of the teacher's device one by one; one of {height} x {width} pixels with "
                f"{spec} does not: {first_line(error)} (ask for fewer outputs, a smaller map_size or smaller images, "
                "or give the teacher a device with more free memory)"
            ) from error

    def _begin(self, batch: ImageBatch, spec: FeatureSpec, size: int) -> DevicePass:
        padded = pad_batch(batch, size) if self._pad_to > 1 else batch
        return self._pipeline.begin(padded, len(batch), spec)

    def _whole(self, batch: ImageBatch) -> int:
        return max(len(batch), self._pad_to)

    def _remember(self, kind: ImageKind, whole: int, size: int) -> None:
        """Note, and report if it is new, that batches of ``whole`` images are computed in parts of ``size``."""
        new = self._alone.learn(kind, size)
        new = (size < whole and self._most.learn(kind, size)) or new
        for limits in (self._alone, self._most):
            limits.use(kind, whole)
        if new:
            log.warning(
                "replica %s: the memory of its device did not suffice for %d images of %d pixels at once%s. From now "
                "on it computes such batches %s, one after the other. A smaller max_batch, fewer outputs, a smaller "
                "map_size or smaller images need less",
                self._name,
                whole,
                kind.pixels,
                "" if size < whole else ", with others in flight",
                f"in parts of {size}" if size < whole else "whole",
            )


def _join(parts: list[Results]) -> Results:
    """The results of consecutive images as one."""
    if len(parts) == 1:
        return parts[0]
    arrays = [np.concatenate(column) for column in zip(*(part.arrays for part in parts), strict=True)]
    return replace(
        parts[0],
        arrays=arrays,
        preprocess=sum(part.preprocess for part in parts),
        pack=sum(part.pack for part in parts),
    )
