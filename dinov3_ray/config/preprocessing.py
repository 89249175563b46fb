"""The rule by which images become a model's input, without any pixels."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

__all__ = ["Misfit", "Preprocessing", "Resample", "Size", "misfit_of"]

Size = tuple[int, int]
"""(height, width)"""

Resample = Literal["bilinear", "bicubic"]
"""How a resize interpolates; antialiased in either case."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Rescale, resize (antialiased), crop the centre, normalize: in this order, as transformers does for DINOv3; the
    processors of other models resize and crop first, and rescale and normalize then.

    At most one of ``size`` and ``shortest_edge`` is set; with neither, images keep their size.

    Attributes:
        size: (h, w) to which images are resized, whatever their aspect.
        shortest_edge: to which the shorter side is resized, keeping the aspect.
        crop_size: (h, w) of the centre crop after that; None: no crop.
        rescale_factor: what uint8 values are multiplied by; 1.0 where the file says ``do_rescale: false``.
        mean, std: of the channels, in rescaled units; zeros and ones where it says ``do_normalize: false``.
        image_size: (h, w) of the model's input. Where the rule fixes none (a shortest edge without a crop, or no
            resize), that of a square image, or what the file's ``size`` says.
        resample: how the resize interpolates.
        rescales_first: the order. Where it is False, uint8 images are resized as such, and rounded.
    """

    size: Size | None
    shortest_edge: int | None
    crop_size: Size | None
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: Size
    resample: Resample = "bilinear"
    rescales_first: bool = True

    def described(self) -> dict[str, Any]:
        """The rule as plain values, to be hashed or stored. ``resample`` and ``rescales_first`` are left out where they
        are DINOv3's, as in what was hashed and stored before there were others."""
        values = asdict(self)
        if self.resample == "bilinear" and self.rescales_first:
            del values["resample"], values["rescales_first"]
        return values

    @property
    def has_fixed_size(self) -> bool:
        """Whether every image comes out at ``image_size``, so that images of any sizes can share a batch."""
        return self.size is not None or self.crop_size is not None

    def resized_to(self, image_size: Size) -> Preprocessing:
        """The same rule for another input size; for its own ``image_size``, the rule unchanged.

        A crop keeps its share of the resized image. A shortest edge without a crop takes a square ``image_size`` as its
        new length. Everything else becomes a plain resize.
        """
        if image_size == self.image_size:
            return self
        if self.crop_size is not None:
            ratio = max(new / old for new, old in zip(image_size, self.crop_size, strict=True))
            return replace(
                self,
                size=None if self.size is None else (round(self.size[0] * ratio), round(self.size[1] * ratio)),
                shortest_edge=None if self.shortest_edge is None else round(self.shortest_edge * ratio),
                crop_size=image_size,
                image_size=image_size,
            )
        if self.shortest_edge is not None and image_size[0] == image_size[1]:
            return replace(self, shortest_edge=image_size[0], image_size=image_size)
        return replace(self, size=image_size, shortest_edge=None, image_size=image_size)


@dataclass(frozen=True, slots=True)
class Misfit:
    """What is wrong with an image size that the patch does not divide, in words for a user.

    Attributes:
        problem: what the model does with it.
        remedy: the size that gives the same grid.
    """

    problem: str
    remedy: str


def misfit_of(image_size: Size, patch_size: int) -> Misfit | None:
    """What is wrong with ``image_size`` for a model of that patch size; None if the patch divides it.

    The rest is dropped, so the map shows less than the image, and whoever lays it over the whole image is off by up to
    the rest. 518 px is the size of DINOv2, whose patch of 14 px divides it.
    """
    height, width = image_size
    below, right = height % patch_size, width % patch_size
    if not below and not right:
        return None
    rest = " and ".join(f"{rest} px {where}" for rest, where in ((right, "at the right"), (below, "below")) if rest)
    fitting = (height - below, width - right)
    size = str(fitting[0]) if fitting[0] == fitting[1] else f"{fitting[0]}x{fitting[1]}"
    dinov2 = "; 518 px is the size of DINOv2" if 518 in image_size and patch_size == 16 else ""
    return Misfit(
        f"its patches of {patch_size} px do not divide its input of {height}x{width} px{dinov2}: {rest} are dropped, "
        "and the map is moved against the image",
        f"--image-size {size} (image_size={fitting[0] if fitting[0] == fitting[1] else fitting}) gives a map of the "
        f"same {fitting[0] // patch_size} x {fitting[1] // patch_size}, aligned with the image, from fewer pixels",
    )
