"""Limits on the images of one pass, by kind of image. Pure.

What was found for one kind holds for all that need at least as much memory: images of more pixels, with the same
outputs. It does not hold for smaller images, nor for other outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dinov3_ray.features import FeatureSpec
from dinov3_ray.images import ImageBatch

__all__ = ["ImageKind", "KindLimits"]

_PATIENCE = 1000  # batches after which twice as many are tried: perhaps another process took the memory, and is gone


@dataclass(frozen=True, slots=True)
class ImageKind:
    """What the memory for one image depends on.

    Attributes:
        spec: the outputs.
        dtype: of the images, by name.
        pixels: of the largest image.
    """

    spec: FeatureSpec
    dtype: str
    pixels: int

    @classmethod
    def of(cls, batch: ImageBatch, spec: FeatureSpec) -> ImageKind:
        pixels = max(tensor.shape[-2] * tensor.shape[-1] for tensor in batch.tensors)
        return cls(spec, str(batch.dtype).removeprefix("torch."), pixels)


@dataclass(slots=True)
class _Limit:
    size: int
    uses: int = 0


class KindLimits:
    """The limits that were found. A kind of which nothing is known has none."""

    def __init__(self) -> None:
        # By outputs and dtype, then by pixels: fewer pixels always have the larger size, so there are few.
        self._limits: dict[tuple[FeatureSpec, str], dict[int, _Limit]] = {}

    def of(self, kind: ImageKind) -> int | None:
        """Images of ``kind`` in one pass at most; None if any number may be tried."""
        holding = self._holding(kind)
        return holding[1].size if holding else None

    def learn(self, kind: ImageKind, size: int) -> bool:
        """Note that more than ``size`` images are too many; returns whether that is new."""
        known = self.of(kind)
        if known is not None and known <= size:
            return False
        limits = self._limits.get((kind.spec, kind.dtype), {})
        kept = {pixels: limit for pixels, limit in limits.items() if pixels < kind.pixels or limit.size < size}
        self._limits[kind.spec, kind.dtype] = {**kept, kind.pixels: _Limit(size)}
        return True

    def use(self, kind: ImageKind, wanted: int) -> None:
        """Count a batch of ``wanted`` images that kept to the limit. After many, it is doubled, or forgotten."""
        holding = self._holding(kind)
        if holding is None:
            return
        pixels, limit = holding
        limit.uses += 1
        if limit.uses >= _PATIENCE:
            limit.size, limit.uses = 2 * limit.size, 0
            if limit.size > wanted:
                del self._limits[kind.spec, kind.dtype][pixels]

    def lowest(self) -> int | None:
        """The lowest limit of all."""
        return min((limit.size for limits in self._limits.values() for limit in limits.values()), default=None)

    def _holding(self, kind: ImageKind) -> tuple[int, _Limit] | None:
        """Of the limits that hold for ``kind``, the lowest, with its pixels."""
        limits = self._limits.get((kind.spec, kind.dtype), {})
        holding = [(pixels, limit) for pixels, limit in limits.items() if pixels <= kind.pixels]
        return min(holding, key=lambda one: one[1].size, default=None)

    def __repr__(self) -> str:
        return f"<KindLimits: {sum(map(len, self._limits.values()))} limits, the lowest {self.lowest()}>"
