"""A simulated accelerator: it waits and computes nothing, so that a bench measures only the cost of moving the work."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch, Images
from dinov3_ray.pool.teacher_pool import TeacherPool

__all__ = ["SPEC", "Accelerator", "Work", "simulated_pool"]

SPEC = FeatureSpec(feature_map=True)


@dataclass(frozen=True, slots=True)
class Work:
    """The work that every contender does: batches of images in, bfloat16 maps [rows, channels, side, side] out.

    The defaults are those of a ViT-L/16 at 224 px on an accelerator that takes 40 ms for 32 images.

    Attributes:
        batches: their number.
        rows: images per batch.
        channels: of the maps.
        side: height and width of the maps.
        pixels: height and width of the images.
        seconds: time of an accelerator per batch.
        replicas: the number of accelerators.
    """

    batches: int = 100
    rows: int = 32
    channels: int = 1024
    side: int = 14
    pixels: int = 224
    seconds: float = 0.040
    replicas: int = 4

    @property
    def ideal_seconds(self) -> float:
        """The time of all batches if every replica is busy all the time."""
        return self.batches * self.seconds / self.replicas

    @property
    def result_bytes(self) -> int:
        """Bytes of a batch's maps."""
        return self.rows * self.channels * self.side**2 * 2

    def images(self) -> torch.Tensor:
        """One batch, uint8 [rows, 3, pixels, pixels]."""
        return torch.zeros(self.rows, 3, self.pixels, self.pixels, dtype=torch.uint8)


class Accelerator:
    """A teacher that waits ``work.seconds`` per ``work.rows`` images, and always returns the same map and token.

    The map has the size of the spec, or else that of the work.
    """

    def __init__(self, work: Work) -> None:
        self._seconds = work.seconds
        self._rows = work.rows
        self.hidden_size = work.channels
        self.grid_size = (work.side, work.side)
        self.dtype = torch.bfloat16
        self._map_BDhw = self._ones(work.rows, self.grid_size)

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        rows = len(ImageBatch.of(images))
        size = spec.map_size or self.grid_size
        if len(self._map_BDhw) < rows or self._map_BDhw.shape[2:] != size:
            self._map_BDhw = self._ones(rows, size)
        if self._seconds:
            time.sleep(self._seconds * rows / self._rows)
        return Features(
            cls=self._map_BDhw[:rows, :, 0, 0].contiguous() if spec.cls else None,
            feature_map=self._map_BDhw[:rows] if spec.feature_map else None,
            fingerprint="simulated",
        )

    def _ones(self, rows: int, size: tuple[int, int]) -> torch.Tensor:
        return torch.ones(rows, self.hidden_size, *size, dtype=torch.bfloat16)


def simulated_pool(work: Work, name: str, max_batch: int | None = None) -> TeacherPool:
    """Start a pool of ``work``'s accelerators; ``max_batch`` is ``work.rows`` if it is not given."""
    factory = functools.partial(Accelerator, work)
    most = work.rows if max_batch is None else max_batch
    return TeacherPool.start(factory, name=name, replicas=work.replicas, num_gpus=0, max_batch=most)
