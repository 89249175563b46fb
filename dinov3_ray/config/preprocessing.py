"""How images become a model's input, as preprocessor_config.json says it: the rule alone, no pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dinov3_ray.config.files import JsonFields, is_finite_number, is_positive_int

__all__ = ["Preprocessing", "Size", "read_preprocessing"]

Size = tuple[int, int]
"""(height, width)"""

_BILINEAR = 2  # PIL's number, which preprocessor_config.json uses


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Rescale, resize (bilinear, antialiased), crop the centre, normalize: in this order, as transformers does.

    At most one of ``size`` and ``shortest_edge`` is set; with neither, images keep their size.

    Attributes:
        size: (h, w) to which images are resized, whatever their aspect.
        shortest_edge: to which the shorter side is resized, keeping the aspect.
        crop_size: (h, w) of the centre crop after that; None: no crop.
        rescale_factor: what uint8 values are multiplied by; 1.0 where the file says ``do_rescale: false``.
        mean, std: of the channels, in rescaled units; zeros and ones where it says ``do_normalize: false``.
        image_size: (h, w) of the model's input. Where the rule fixes none (a shortest edge without a crop, or no
            resize), that of a square image, or what the file's ``size`` says.
    """

    size: Size | None
    shortest_edge: int | None
    crop_size: Size | None
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: Size

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


def read_preprocessing(fields: JsonFields) -> Preprocessing:
    """The rule that preprocessor_config.json states; complaints are noted in ``fields``.

    Keys that the file leaves out have transformers' defaults (bilinear, factor 1/255, all steps but the crop on),
    except for ``size``, ``image_mean`` and ``image_std``: a guess there would silently spoil every feature.
    """
    if fields.integer("resample", _BILINEAR, minimum=0) != _BILINEAR:
        fields.complain("resample", "must be 2 (bilinear)", fields.values["resample"])
    if fields.flag("do_pad", False):
        fields.complain("do_pad", "must be false: padding is not supported", True)
    size, shortest_edge = _read_size(fields)
    nominal = size or ((shortest_edge, shortest_edge) if shortest_edge else None)
    if not fields.flag("do_resize", True):
        size = shortest_edge = None
    elif nominal is None and not fields.has("size"):
        fields.complain("size", "must be given", None)
    crop_size = _read_pair(fields, "crop_size") if fields.flag("do_center_crop", False) else None
    if fields.flag("do_center_crop", False) and not fields.has("crop_size"):
        fields.complain("crop_size", "must be given where do_center_crop is true", None)
    resized = size or ((shortest_edge, shortest_edge) if shortest_edge else None)
    if crop_size and resized and (crop_size[0] > resized[0] or crop_size[1] > resized[1]):
        fields.complain("crop_size", f"must fit into the resized image {list(resized)}", list(crop_size))
    image_size = crop_size or nominal
    if image_size is None and not fields.problems:
        fields.complain("size", "must be given, as the nominal input size, even where do_resize is false", None)
    mean, std = _read_statistics(fields)
    factor = fields.number("rescale_factor", 1 / 255) if fields.flag("do_rescale", True) else 1.0
    return Preprocessing(size, shortest_edge, crop_size, factor, mean, std, image_size or (0, 0))


def _read_size(fields: JsonFields) -> tuple[Size | None, int | None]:
    """``size`` as ((h, w), None) or (None, shortest edge)."""
    value: Any = fields.values.get("size")
    if isinstance(value, dict):
        value = {key: side for key, side in value.items() if side is not None}
        if value.keys() == {"shortest_edge"} and is_positive_int(value["shortest_edge"]):
            return None, value["shortest_edge"]
    elif is_positive_int(value) and not fields.flag("default_to_square", True):
        return None, value
    return _read_pair(fields, "size", also=" or {shortest_edge}"), None


def _read_pair(fields: JsonFields, key: str, *, also: str = "") -> Size | None:
    value: Any = fields.values.get(key)
    if value is None:
        return None
    if is_positive_int(value):
        return value, value
    if isinstance(value, dict):
        value = {name: side for name, side in value.items() if side is not None}
        if value.keys() == {"height", "width"} and all(is_positive_int(side) for side in value.values()):
            return value["height"], value["width"]
    fields.complain(key, f"must be an integer, or an object of {{height, width}}{also}, all >= 1", fields.values[key])
    return None


def _read_statistics(fields: JsonFields) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if not fields.flag("do_normalize", True):
        return mean, std
    return _read_channels(fields, "image_mean", mean), _read_channels(fields, "image_std", std)


def _read_channels(fields: JsonFields, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = fields.values.get(key)
    if not isinstance(value, list) or len(value) != 3 or not all(is_finite_number(item) for item in value):
        fields.complain(key, "must be three finite numbers, one a channel", value)
        return default
    if key == "image_std" and min(value) <= 0:
        fields.complain(key, "must be positive: images are divided by it", value)
        return default
    return float(value[0]), float(value[1]), float(value[2])
