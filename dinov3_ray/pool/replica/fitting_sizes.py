"""How many images of a kind fit a replica's device at once, as it turned out. Pure.

What was found for one kind holds for all that need at least as much: images of more pixels, with the same outputs. It
does not hold for smaller images, nor for other outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dinov3_ray.features import FeatureSpec
from dinov3_ray.images import ImageBatch

__all__ = ["FittingSizes", "ImageKind"]

_PATIENCE = 1000  # batches after which twice the size is tried: perhaps another process took the memory, and is gone


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
class _Found:
    size: int
    uses: int = 0


class FittingSizes:
    """The sizes that are known to fit. A kind about which nothing is known may have any size."""

    def __init__(self) -> None:
        # By outputs and dtype, then by pixels: fewer pixels always have the larger size, so there are few.
        self._found: dict[tuple[FeatureSpec, str], dict[int, _Found]] = {}

    def limit(self, kind: ImageKind) -> int | None:
        """Images of ``kind`` in one pass at most; None if no batch of such images was too large so far."""
        holding = self._holding(kind)
        return holding[1].size if holding else None

    def use(self, kind: ImageKind, wanted: int) -> None:
        """Count a batch of ``wanted`` images that was computed within the limit. After many, the limit is doubled."""
        holding = self._holding(kind)
        if holding is None:
            return
        pixels, found = holding
        found.uses += 1
        if found.uses >= _PATIENCE:
            found.size, found.uses = 2 * found.size, 0
            if found.size > wanted:
                # Whole, and with others in flight: as if nothing had happened.
                del self._found[kind.spec, kind.dtype][pixels]

    def learn(self, kind: ImageKind, size: int) -> bool:
        """Note that ``size`` images fit and more may not; returns whether that lowers the limit."""
        limit = self.limit(kind)
        if limit is not None and limit <= size:
            return False
        known = self._found.setdefault((kind.spec, kind.dtype), {})
        kept = {pixels: found for pixels, found in known.items() if pixels < kind.pixels or found.size < size}
        self._found[kind.spec, kind.dtype] = {**kept, kind.pixels: _Found(size)}
        return True

    def smallest(self) -> int | None:
        """The lowest limit of all."""
        return min((found.size for known in self._found.values() for found in known.values()), default=None)

    def _holding(self, kind: ImageKind) -> tuple[int, _Found] | None:
        """Of the limits that hold for ``kind``, the lowest, with its pixels."""
        known = self._found.get((kind.spec, kind.dtype), {})
        holding = [(pixels, found) for pixels, found in known.items() if pixels <= kind.pixels]
        return min(holding, key=lambda one: one[1].size, default=None)

    def __repr__(self) -> str:
        return f"<FittingSizes: {sum(map(len, self._found.values()))} limits, the lowest {self.smallest()}>"
