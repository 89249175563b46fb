"""An accelerator that takes its time and computes nothing: what remains is what moving and steering the work costs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from dinov3_ray.features import Features, FeatureSpec
from dinov3_ray.images import ImageBatch, Images

__all__ = ["SPEC", "Accelerator", "Work"]

SPEC = FeatureSpec(feature_map=True)


@dataclass(frozen=True, slots=True)
class Work:
    """The same work for every contender: ``batches`` of images in, maps [rows, channels, side, side] in bfloat16 out.

    The defaults are a ViT-L/16 at 224 px on an accelerator that takes 40 ms for 32 images.
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
        """What it takes if every replica is busy all the time."""
        return self.batches * self.seconds / self.replicas

    @property
    def result_bytes(self) -> int:
        return self.rows * self.channels * self.side**2 * 2

    def images(self) -> torch.Tensor:
        """One batch, uint8 [rows, 3, pixels, pixels]."""
        return torch.zeros(self.rows, 3, self.pixels, self.pixels, dtype=torch.uint8)


class Accelerator:
    """A teacher that waits ``work.seconds`` a batch and hands out one and the same map, and one and the same token."""

    def __init__(self, work: Work) -> None:
        self._seconds = work.seconds
        self._rows = work.rows
        self._map_BDhw = torch.ones(work.rows, work.channels, work.side, work.side, dtype=torch.bfloat16)
        self.hidden_size = work.channels
        self.grid_size = (work.side, work.side)
        self.dtype = torch.bfloat16

    def extract(self, images: Images, spec: FeatureSpec) -> Features:
        rows = len(ImageBatch.of(images))
        if self._seconds:
            time.sleep(self._seconds * rows / self._rows)
        return Features(
            cls=self._map_BDhw[:rows, :, 0, 0].contiguous() if spec.cls else None,
            feature_map=self._map_BDhw[:rows] if spec.feature_map else None,
            fingerprint="simulated",
        )
