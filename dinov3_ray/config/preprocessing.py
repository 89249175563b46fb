"""The rule by which images become a model's input, without any pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dinov3_ray.errors import InputError

__all__ = ["Misfit", "Preprocessing", "Resample", "Size", "ViewSize", "followed_size", "misfit_of"]

Size = tuple[int, int]
"""(height, width)"""

Resample = Literal["bilinear", "bicubic"]
"""How a resize interpolates; antialiased in either case."""

ViewSize = Literal["input", "input/2"]
"""A size of a model's input that follows the images, the views that a student sees: their own, or half of it.

``input``: nothing is resized; what the patch does not divide is cut off at the right and below. ``input/2``: the whole
view is resized to half its size, rounded down to whole patches, so that the feature map covers all of it.
"""

_DIVISORS: dict[ViewSize, int] = {"input": 1, "input/2": 2}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Rescale, resize (antialiased), crop the centre, normalize: in this order, as transformers does for DINOv3; the
    processors of other models resize and crop first, and rescale and normalize then.

    At most one of ``size`` and ``shortest_edge`` is set; with neither, images keep their size, unless the rule
    ``follows`` it.

    Attributes:
        size: (h, w) to which images are resized, whatever their aspect.
        shortest_edge: to which the shorter side is resized, keeping the aspect.
        crop_size: (h, w) of the centre crop after that; None: no crop.
        rescale_factor: what uint8 values are multiplied by; 1.0 where the file says ``do_rescale: false``.
        mean, std: of the channels, in rescaled units; zeros and ones where it says ``do_normalize: false``.
        image_size: (h, w) of the model's input. Where the rule fixes none (a shortest edge without a crop, no resize,
            or one that follows), that of a square image, or what the file's ``size`` says.
        resample: how the resize interpolates.
        rescales_first: the order. Where it is False, uint8 images are resized as such, and rounded.
        follows: in place of the sizes and the crop: how the input's size follows that of the images.
        multiple: with ``follows``, the patch size, of which the input's sides are multiples.
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
    follows: ViewSize | None = None
    multiple: int = 1

    def described(self) -> dict[str, Any]:
        """The rule as plain values, to be hashed or stored. ``resample`` and ``rescales_first`` are left out where they
        are DINOv3's, and ``follows`` where there is none, as in what was hashed and stored before there were others."""
        values = asdict(self)
        if self.resample == "bilinear" and self.rescales_first:
            del values["resample"], values["rescales_first"]
        if self.follows is None:
            del values["follows"], values["multiple"]
        return values

    @property
    def has_fixed_size(self) -> bool:
        """Whether every image comes out at ``image_size``, so that images of any sizes can share a batch."""
        return self.size is not None or self.crop_size is not None

    @property
    def divisor(self) -> int:
        """By which the rule divides the sides of images where it follows them; 1 of other rules."""
        return 1 if self.follows is None else _DIVISORS[self.follows]

    @property
    def least_side(self) -> int:
        """Pixels of the smallest side of an image of which a whole patch is left; 1 where the rule does not follow."""
        return self.divisor * self.multiple

    @property
    def nominal_view(self) -> Size:
        """(h, w) of images that come to ``image_size``, or, where the patch does not divide that, to the next below."""
        height, width = self.image_size
        return height * self.divisor, width * self.divisor

    def resized_size(self, view: Size) -> Size:
        """(h, w) to which an image of the size ``view`` is resized, before anything is cut off."""
        if self.follows == "input/2":
            return self.input_size(view)
        if self.size is not None:
            return self.size
        if self.shortest_edge is None:
            return view
        height, width = view
        # The long side is truncated, not rounded, as in transformers' get_resize_output_image_size.
        longest_edge = int(self.shortest_edge * max(view) / min(view))
        return (longest_edge, self.shortest_edge) if width <= height else (self.shortest_edge, longest_edge)

    def input_size(self, view: Size) -> Size:
        """(h, w) of the model's input for an image of the size ``view``."""
        if self.follows is not None:
            return followed_size(self.follows, view, self.multiple)
        return self.crop_size or self.resized_size(view)

    def common_input_size(self, views: Iterable[Size]) -> Size:
        """(h, w) of the model's input for the images of one batch, of which there is at least one.

        Raises:
            InputError: the rule brings them to different sizes.
        """
        sizes = sorted({self.input_size(view) for view in views})
        if len(sizes) > 1:
            keeps = "this model's preprocessing keeps their aspect"
            if self.follows is not None:
                keeps = f"image_size={self.follows!r} takes each at a size of its own"
            raise InputError(
                f"images of one batch must come to one size, but {keeps}: {sizes}; give the teacher an "
                "image_size=(h, w), or images of one shape"
            )
        return sizes[0]

    def following(self, view_size: ViewSize, patch_size: int) -> Preprocessing:
        """The same rule for a model of that patch size whose input follows the images, without a crop."""
        return replace(self, size=None, shortest_edge=None, crop_size=None, follows=view_size, multiple=patch_size)

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


def followed_size(follows: ViewSize, view: Size, patch_size: int) -> Size:
    """(h, w) of the input of a model of that patch size that follows images of the size ``view``, in whole patches."""
    height, width = (side // (_DIVISORS[follows] * patch_size) * patch_size for side in view)
    return height, width


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
