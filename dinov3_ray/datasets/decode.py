"""Image bytes to pixels, as people see them: uint8 RGB [3,H,W], or the reason why not.

What each kind becomes, in a file or as a decoded array:

- EXIF orientation is applied, unless the EXIF data are damaged; of an animation, the first frame is taken.
- Transparent pixels (RGBA, LA, palette transparency) are composited on a background, white by default, as a
  browser shows them. Dropping the alpha channel would bring up colours that nobody sees.
- Grey is repeated to three channels; 16-bit grey is scaled to 8 bits (Pillow's own conversion clips it to white);
  16-bit colour in files keeps its high bytes, which are all that Pillow hands over; floating point is taken as [0, 1].
- 16-bit pixels, grey or colour, that use at most 12 bits are refused, and so are those that are at most 1 of 255:
  whether they are dark or of another range, they do not say. 16-bit colour in a file is also refused where all its
  high bytes are 0.
- TIFF's tags that change what pixels mean are heeded (white as 0), or the file is refused (signed bytes).
- CMYK and YCCK are converted without a colour profile, as Pillow, torchvision and transformers do; embedded profiles
  are ignored for the same reason.
- Metadata that have no say in this are left out where Pillow stumbles over them.

A view is identified by a digest of its pixels, so that targets belong to what the student sees, not to a file. This
module imports neither torch nor Ray, so that decoding processes start fast.
"""

from __future__ import annotations

import hashlib
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dinov3_ray.datasets.formats import Plugin, foreign_plugins, name_format, without_metadata
from dinov3_ray.datasets.limits import MAX_PIXELS
from dinov3_ray.errors import ConfigError, InputError

__all__ = ["Decoder", "Unreadable", "UnreadableKind", "view_digest"]


_T = TypeVar("_T")

UnreadableKind = Literal[
    "empty",
    "missing",
    "io",
    "not an image",
    "truncated",
    "corrupt",
    "too large",
    "too small",
    "unsupported",
    "refused",
    "out of memory",
    "crashed the decoder",
]
"""Why an image has no features; ``refused`` is the teacher's own InputError; ``out of memory`` says that the node
could not decode it, or that the teacher's device does not hold even one such image."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An image that gives no pixels: the kind of trouble, and the detail in words."""

    kind: UnreadableKind
    detail: str


#: Pixels that are converted at a time: copies of a whole image, of megabytes each, would be mapped into memory anew,
#: which cost more than decoding a JPEG of 2000 x 1500 px did (49 ms; 21 ms in strips).
_STRIP_PIXELS = 2**18

_MAY_BE_METADATA = ("corrupt", "truncated", "not an image")
_NARROW = 4095  # the largest value of 12 bits
_TRIVIAL = 16  # images of fewer pixels may be of any range


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes images under fixed rules, which are part of a store's identity.

    Args:
        max_pixels: larger images are refused before their pixels are decoded. An image takes up to 7 bytes of memory
            a pixel while it is decoded: 4 of Pillow's, and 3 of the result.
        min_side: smaller images (height or width) are refused; the teacher's patch size.
        background: RGB, 0..255, under transparent pixels.
        shrink_to: encoded images are shrunk by 2, 4 or 8 as they are decoded, by the largest that leaves this many
            pixels to their shorter side; None decodes all at their own size. JPEGs are decoded at the smaller size
            (Pillow's ``draft``), others are averaged.
        plugins: formats that Pillow does not read by itself.

    Raises:
        ConfigError: an option is out of range.
    """

    max_pixels: int = MAX_PIXELS
    min_side: int = 1
    background: tuple[int, int, int] = (255, 255, 255)
    shrink_to: int | None = None
    plugins: tuple[Plugin, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "background", tuple(self.background))
        for name, value in (("max_pixels", self.max_pixels), ("shrink_to", self.shrink_to)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be an integer, at least 1; got {value!r}")
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ConfigError(f"background must be three integers in 0..255; got {self.background!r}")

    def describe(self) -> dict[str, Any]:
        """The rules, as JSON values; :meth:`from_rules` reads them."""
        return {
            "max_pixels": self.max_pixels,
            "min_side": self.min_side,
            "background": list(self.background),
            "shrink_to": self.shrink_to,
            "plugins": [plugin.form for plugin in self.plugins] or None,
        }

    @classmethod
    def from_rules(cls, rules: Mapping[str, Any]) -> Decoder:
        """The decoder of a store whose manifest has ``rules``; plug-ins must be registered in this process.

        It carries them to others.
        """
        plugins = tuple(plugin for plugin in foreign_plugins() if plugin.form in (rules.get("plugins") or ()))
        background = tuple(rules["background"])
        return cls(rules["max_pixels"], rules["min_side"], background, rules.get("shrink_to"), plugins)

    def decode(self, data: bytes | memoryview) -> np.ndarray | Unreadable:
        """uint8 RGB [3,H,W], contiguous, or why there is none. Never raises for what the bytes hold."""
        if len(data) == 0:
            return Unreadable("empty", "the file has no bytes")
        for plugin in self.plugins:
            plugin.register()
        with warnings.catch_warnings():
            # Pillow's warnings (odd EXIF, large image) would go to a worker's log, once per image.
            warnings.simplefilter("ignore")
            image = self._decode(data)
            if isinstance(image, Unreadable) and image.kind in _MAY_BE_METADATA:
                bare = without_metadata(bytes(data))
                again = image if bare is None else self._decode(bare)
                return image if isinstance(again, Unreadable) else again
            return image

    def read(self, data: bytes, name: str) -> np.ndarray:
        """Like :meth:`decode`, but raises InputError, with ``name`` in its message."""
        image = self.decode(data)
        if isinstance(image, Unreadable):
            raise InputError(f"{name} cannot be read as an image ({image.kind}): {image.detail}")
        return image

    def take(self, array: np.ndarray) -> np.ndarray | Unreadable:
        """Pixels that are decoded already, as uint8 [3,H,W], contiguous, under the rules for files.

        Args:
            array: [H,W], [H,W,C] or [C,H,W], where C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA); uint8, other
                integers in 0..255 or of 16 bits, floating point in [0, 1], or bool.
        """
        if array.ndim == 2:
            array = array[None]
        elif array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[2] in _CHANNELS:
            array = array.transpose(2, 0, 1)
        if array.ndim != 3 or array.shape[0] not in _CHANNELS:
            return Unreadable(
                "unsupported",
                f"decoded images must be [H,W], [H,W,C] or [C,H,W], with 1 to 4 channels; got {array.shape}",
            )
        trouble = self._check_size(array.shape[1], array.shape[2])
        if trouble is not None:
            return trouble
        if array.dtype.kind not in "fiub":
            return Unreadable("unsupported", f"pixels must be numbers; got {array.dtype}")
        least, most = array.min(), array.max()
        if array.dtype.kind in "iu" and array.dtype.itemsize >= 4 and least >= 0 and most <= 255:
            array = array.astype(np.uint8)  # bytes that went through Python's integers
        has_alpha = len(array) in (2, 4)
        brightest = array[:-1].max() if has_alpha and array.dtype != np.uint8 else most
        trouble = _check_range(array.dtype, least, most, brightest, array[0].size)
        if trouble is not None:
            return trouble
        array = _scaled(array)
        if has_alpha:
            rgba = np.concatenate([np.broadcast_to(array[:-1], (3, *array.shape[1:])), array[-1:]])
            shown = self._to_rgb(Image.fromarray(np.ascontiguousarray(rgba.transpose(1, 2, 0))))
            array = np.asarray(shown).transpose(2, 0, 1)
            if (trouble := _check_shown(array)) is not None:
                return trouble
        return np.ascontiguousarray(np.broadcast_to(array, (3, *array.shape[1:])))

    def _check_size(self, height: int, width: int) -> Unreadable | None:
        if height * width > self.max_pixels:
            return Unreadable("too large", f"{height} x {width} pixels; at most {self.max_pixels} pixels are decoded")
        if min(height, width) < self.min_side:
            return Unreadable("too small", f"{height} x {width} pixels; at least {self.min_side} each way are needed")
        return None

    def _decode(self, data: bytes | memoryview) -> np.ndarray | Unreadable:
        found = self._decode_within_limit(data)
        if found is _PILLOWS_LIMIT:
            with _without_pillows_limit():
                found = self._decode_within_limit(data)
        return found

    def _decode_within_limit(self, data: bytes | memoryview) -> np.ndarray | Unreadable:
        image = _pillow(lambda: Image.open(io.BytesIO(data)), data)
        if isinstance(image, Unreadable):
            return image
        with image:
            trouble = self._check_size(image.height, image.width) or _unfit(image)
            if trouble is not None:
                return trouble
            stored = _stored_as(image, data)
            if isinstance(stored, Unreadable):
                return stored
            factor, size = self._shrinking(*image.size), image.size
            if factor > 1:
                smaller = image.width // factor, image.height // factor
                _pillow(lambda: image.draft(None, smaller), data)
            loaded = _pillow(image.load, data)
            if isinstance(loaded, Unreadable):
                return loaded
            try:
                return self._pixels(image, factor if image.size == size else 1, stored)
            except MemoryError:
                return _OUT_OF_MEMORY

    def _shrinking(self, width: int, height: int) -> int:
        if self.shrink_to is None:
            return 1
        least = max(self.shrink_to, self.min_side)
        return next((factor for factor in (8, 4, 2) if min(width, height) // factor >= least), 1)

    def _pixels(self, image: Image.Image, factor: int, form: _Stored) -> np.ndarray | Unreadable:
        """Those of a loaded image, shrunk by ``factor``: [3,H,W], upright."""
        rows = max(1, _STRIP_PIXELS // (image.width * factor)) * factor
        boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
        if _is_wide(image):
            ranges = [(values.min(), values.max()) for values in (np.asarray(image.crop(box)) for box in boxes)]
            least, most = min(least for least, _ in ranges), max(most for _, most in ranges)
            dtype = np.asarray(image.crop((0, 0, 1, 1))).dtype
            trouble = _check_range(dtype, least, most, most, image.width * image.height)
            if trouble is not None:
                return trouble
        height, width = -(-image.height // factor), -(-image.width // factor)
        orientation = _orientation(image)
        upright = np.empty((3, width, height) if orientation >= 5 else (3, height, width), np.uint8)
        stored = _as_stored(upright, orientation)
        brightest = 0
        for box in boxes:
            crop = image.crop(box)
            if form.narrow > 1 and brightest <= form.narrow:
                brightest = max(brightest, _brightest(crop))
            strip = self._to_rgb(crop, form.inverted)
            if isinstance(strip, Unreadable):
                return strip
            pixels = np.asarray(strip if factor == 1 else strip.reduce(factor))
            top = box[1] // factor
            stored[:, top : top + len(pixels)] = pixels.transpose(2, 0, 1)
        if _is_wide(image):
            return upright
        # Where no high byte has a bit, black lines may still show on their background.
        if form.narrow > 1 and brightest <= form.narrow and (brightest or not upright.any()):
            return Unreadable("unsupported", f"16-bit pixels of at most 12 bits: {_UNCERTAIN}")
        trouble = _check_shown(upright)
        return upright if trouble is None else trouble

    def _to_rgb(self, image: Image.Image, inverted: bool = False) -> Image.Image | Unreadable:
        if _is_wide(image):
            values = np.asarray(image)
            grey = _scaled(values)
            rgb = np.repeat((255 - grey if inverted else grey)[:, :, None], 3, axis=2)
            transparent = image.info.get("transparency")
            if isinstance(transparent, int):
                rgb[values == transparent] = self.background
            return Image.fromarray(rgb)
        if image.has_transparency_data:
            top = _pillow(lambda: image.convert("RGBA"), b"")
            if isinstance(top, Unreadable):
                return top
            return Image.alpha_composite(Image.new("RGBA", top.size, (*self.background, 255)), top).convert("RGB")
        return image if image.mode == "RGB" else _pillow(lambda: image.convert("RGB"), b"")


_CHANNELS = 1, 2, 3, 4
_PILLOWS_LIMIT = Unreadable("too large", "beyond Pillow's own limit")
_OUT_OF_MEMORY = Unreadable("out of memory", "the node had too little memory to decode it")
_UNCERTAIN = "black if their range is that of their type; scale them to it, or to 8 bits"


def _pillow(step: Callable[[], _T], data: bytes | memoryview) -> _T | Unreadable:
    """What ``step`` gives, which is Pillow's work alone: whatever it raises is the image's fault, not ours."""
    try:
        return step()
    except UnidentifiedImageError:
        found = name_format(bytes(data[:4096]))
        if found is None:
            return Unreadable("not an image", f"no image format that Pillow knows; begins with {bytes(data[:8])!r}")
        return Unreadable(*found)
    except Image.DecompressionBombError:
        return _PILLOWS_LIMIT
    except MemoryError:
        return _OUT_OF_MEMORY
    except Exception as error:  # noqa: BLE001 - on damaged bytes, Pillow's plug-ins raise whatever they stumble over
        # Pillow says "truncated" where the file ends early, in one wording or another.
        what = f"{type(error).__name__}: {error}"
        short = "truncated" in what.lower() or "Truncated File Read" in what or isinstance(error, EOFError)
        unsupported = "unsupported" in what.lower() or "not supported" in what.lower()
        return Unreadable("truncated" if short else "unsupported" if unsupported else "corrupt", what)


_limit = threading.Lock()


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Pillow's own limit is the whole process's, and formats ask for it in places of their own; ``max_pixels`` stands.

    It is lifted for images beyond it alone, and other threads are not meant to notice.
    """
    with _limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _unfit(image: Image.Image) -> Unreadable | None:
    """Why an image that Pillow could load is not the picture that people see."""
    if image.format == "EPS":
        return Unreadable("unsupported", "EPS is a program, which another program would have to run")
    if image.format == "TIFF" and _pillow(lambda: int(image.tag_v2.get(254, 0)), b"") == 1:  # type: ignore[attr-defined]
        return Unreadable(
            "unsupported", "the first image in this TIFF is a preview, as in camera raw files (see rawpy)"
        )
    return None


def _is_wide(image: Image.Image) -> bool:
    """Whether it is grey of more than 8 bits per pixel, which Pillow's own conversion clips."""
    return image.mode.startswith("I") or image.mode == "F"


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a file's pixels differ from those that Pillow hands over.

    Attributes:
        narrow: colours of which the largest, as Pillow hands it over, is at most this are of 12 bits in 16.
        inverted: 0 is white, and Pillow leaves it so.
    """

    narrow: int = 1
    inverted: bool = False


def _stored_as(image: Image.Image, data: bytes | memoryview) -> _Stored | Unreadable:
    """What the header of an opened image, not yet loaded, says of its pixels; each format has its own place for it."""
    args = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in getattr(image, "tile", ())]
    drops_low_bytes = not _is_wide(image) and any(_WIDE_RAWMODE.search(str(arg[0])) for arg in args if arg)
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, kinds = _pillow(lambda: tuple(tags.get(258, (1,))), b""), _pillow(lambda: tuple(tags.get(339, (1,))), b"")
        if isinstance(bits, Unreadable) or isinstance(kinds, Unreadable):
            return _Stored()
        if 2 in kinds and 8 in bits:
            return Unreadable("unsupported", "TIFF of signed 8-bit pixels, which Pillow takes for unsigned ones")
        if max(bits) > 8 and not _is_wide(image) and not drops_low_bytes:
            return Unreadable("unsupported", f"TIFF of {max(bits)}-bit pixels in separate planes: Pillow misreads them")
        return _Stored(15 if drops_low_bytes else 1, _is_wide(image) and tags.get(262) == 0)
    if image.format == "PPM" and not _is_wide(image) and args and len(args[0]) > 1 and isinstance(args[0][1], int):
        return _Stored(round(_NARROW * 255 / args[0][1])) if args[0][1] > 32767 else _Stored()
    if image.format == "JPEG2000" and not _is_wide(image):
        start = bytes(data).find(b"\xff\x4f\xff\x51")  # SOC and SIZ; the depth of the first component is 42 bytes on
        drops_low_bytes = start >= 0 and (data[start + 42 : start + 43] or b"\0")[0] & 0x7F == 15
    return _Stored(15) if drops_low_bytes else _Stored()


_WIDE_RAWMODE = re.compile(r"^(L|LA|La|RGB|RGBA|RGBa|RGBX+|CMYK|R|G|B|A);16[BLNS]?$")


def _brightest(image: Image.Image) -> int:
    """The largest value of its colours, without alpha."""
    found = image.getextrema()
    bands = found if isinstance(found[0], tuple) else (found,)
    named = zip(image.getbands(), bands, strict=True)
    return max(int(most) for band, (_, most) in named if band not in "Aa")


def _check_range(dtype: np.dtype[Any], least: float, most: float, brightest: float, pixels: int) -> Unreadable | None:
    """Why pixels of this dtype and range have no meaning as colours that is certain.

    ``brightest`` is the largest value without alpha.
    """
    if dtype.kind == "b":
        return None
    if dtype.kind == "f":
        if not (least >= 0 and most <= 1):  # nor with NaN
            return Unreadable("unsupported", "floating-point pixels outside [0, 1]")
        narrow = 1 / 255 + 1e-6
    elif least < 0 or most > 65535:
        return Unreadable("unsupported", f"integer pixels of {dtype} outside 0..65535")
    else:
        narrow = 1 if dtype == np.uint8 else _NARROW
    if 0 < brightest <= narrow and (pixels >= _TRIVIAL or narrow == _NARROW):
        return Unreadable("unsupported", f"pixels of {dtype} of which the largest is {brightest:g}: {_UNCERTAIN}")
    return None


def _check_shown(image: np.ndarray) -> Unreadable | None:
    """Why an image [3,H,W] of 8 bits a colour is more likely a mask of 0 and 1 than a picture."""
    if image[0, 0].max() <= 1 and image[0].size >= _TRIVIAL and image.max() == 1:
        return Unreadable("unsupported", f"8-bit pixels of which the largest is 1: {_UNCERTAIN}")
    return None


def _scaled(values: np.ndarray) -> np.ndarray:
    """Pixels that :func:`_check_range` lets pass, as uint8 of the same shape."""
    if values.dtype.kind == "f":
        return np.round(values.astype(np.float32, copy=False) * 255).astype(np.uint8)
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF says; 1 where that is damaged, since the pixels are not."""
    found = _pillow(lambda: image.getexif().get(ExifTags.Base.Orientation, 1), b"")
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """A view of ``upright`` [3,H,W] as a file of this EXIF orientation stores it."""
    stored = upright.swapaxes(1, 2) if orientation >= 5 else upright
    down = -1 if orientation in (3, 4, 6, 7) else 1
    right = -1 if orientation in (2, 3, 7, 8) else 1
    return stored[:, ::down, ::right]


_DIGEST_SIZE = 16


def view_digest(image: np.ndarray) -> bytes:
    """16 bytes of SHA-256 over an image's dtype, shape and pixels: equal only for the same pixels in the same form.

    128 bits make an accidental collision among 10^9 views less likely than 10^-20. SHA-256 rather than
    BLAKE2b, since processors have instructions for it (1.8 against 0.9 GB/s).
    """
    digest = hashlib.sha256(f"{image.dtype.str}{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).reshape(-1).view(np.uint8).data)
    return digest.digest()[:_DIGEST_SIZE]
