"""Image bytes to pixels, as people see them: uint8 RGB [3,H,W], or the reason why not.

What each kind becomes:

- EXIF orientation is applied, unless the EXIF data are damaged; of an animation, the first frame is taken.
- Transparent pixels (RGBA, LA, palette transparency) are composited on a background, white by default, as a
  browser shows them. Dropping the alpha channel would bring up colours that nobody sees.
- Grey is repeated to three channels; 16-bit grey is scaled to 8 bits (Pillow's own conversion clips it to white);
  16-bit RGB keeps its high bytes; floating point is taken as [0, 1].
- CMYK and YCCK are converted without a colour profile, as Pillow, torchvision and transformers do; embedded profiles
  are ignored for the same reason.

A view is identified by a digest of its pixels, so that targets belong to what the student sees, not to a file. This
module imports neither torch nor Ray, so that decoding processes start fast.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dinov3_ray.datasets import MAX_PIXELS
from dinov3_ray.errors import ConfigError, InputError

__all__ = ["DIGEST_SIZE", "IMAGE_EXTENSIONS", "Decoder", "Unreadable", "UnreadableKind", "view_digest"]


IMAGE_EXTENSIONS = frozenset(
    {"avif", "bmp", "dib", "gif", "heic", "jfif", "jp2", "jpe", "jpeg", "jpg"}
    | {"pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"}
)
"""Extensions of names that are taken for images where other files are expected too."""

_PILLOW_REFUSES = 2 * MAX_PIXELS

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
"""Why an image has no features; ``refused`` is the teacher's own InputError; ``out of memory`` says that its
device does not hold even one such image."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An image that gives no pixels: the kind of trouble, and the detail in words."""

    kind: UnreadableKind
    detail: str


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes images under fixed rules, which are part of a store's identity.

    Args:
        max_pixels: larger images are refused before their pixels are decoded.
        min_side: smaller images (height or width) are refused; the teacher's patch size.
        background: RGB, 0..255, under transparent pixels.

    Raises:
        ConfigError: an option is out of range.
    """

    max_pixels: int = MAX_PIXELS
    min_side: int = 1
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        object.__setattr__(self, "background", tuple(self.background))
        if not 1 <= self.max_pixels <= _PILLOW_REFUSES:
            raise ConfigError(
                f"max_pixels must lie in 1..{_PILLOW_REFUSES} (where Pillow itself refuses); got {self.max_pixels}"
            )
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ConfigError(f"background must be three integers in 0..255; got {self.background!r}")

    def decode(self, data: bytes | memoryview) -> np.ndarray | Unreadable:
        """uint8 RGB [3,H,W], contiguous, or why there is none. Never raises for what the bytes hold."""
        if len(data) == 0:
            return Unreadable("empty", "the file has no bytes")
        try:
            with warnings.catch_warnings():
                # Pillow's warnings (odd EXIF, large image) would go to a worker's log, once per image.
                warnings.simplefilter("ignore")
                return self._decode(data)
        except UnidentifiedImageError:
            return Unreadable("not an image", f"no image format that Pillow knows; begins with {bytes(data[:8])!r}")
        except Image.DecompressionBombError as error:
            return Unreadable("too large", str(error))
        except MemoryError:
            return Unreadable("too large", "decoding ran out of memory")
        except Exception as error:  # noqa: BLE001 - on damaged bytes, Pillow's plug-ins raise whatever they stumble over
            # Pillow says "truncated" where the file ends early, in one wording or another.
            what = f"{type(error).__name__}: {error}"
            short = "truncated" in what.lower() or "Truncated File Read" in what or isinstance(error, EOFError)
            return Unreadable("truncated" if short else "corrupt", what)

    def read(self, data: bytes, name: str) -> np.ndarray:
        """Like :meth:`decode`, but raises InputError, with ``name`` in its message."""
        image = self.decode(data)
        if isinstance(image, Unreadable):
            raise InputError(f"{name} cannot be read as an image ({image.kind}): {image.detail}")
        return image

    def take(self, array: np.ndarray) -> np.ndarray | Unreadable:
        """Pixels that are decoded already (uint8; [H,W], [H,W,1|3] or [1|3,H,W]) as uint8 [3,H,W], contiguous."""
        if array.dtype != np.uint8:
            return Unreadable("unsupported", f"decoded images must be uint8; got {array.dtype}")
        if array.ndim == 2:
            array = array[None]
        elif array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[2] in (1, 3):
            array = array.transpose(2, 0, 1)
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            return Unreadable("unsupported", f"decoded images must be [H,W], [H,W,3] or [3,H,W]; got {array.shape}")
        trouble = self._check_size(array.shape[1], array.shape[2])
        if trouble is not None:
            return trouble
        return np.ascontiguousarray(np.broadcast_to(array, (3, *array.shape[1:])))

    def _check_size(self, height: int, width: int) -> Unreadable | None:
        if height * width > self.max_pixels:
            return Unreadable("too large", f"{height} x {width} pixels; at most {self.max_pixels} pixels are decoded")
        if min(height, width) < self.min_side:
            return Unreadable("too small", f"{height} x {width} pixels; at least {self.min_side} each way are needed")
        return None

    def _decode(self, data: bytes | memoryview) -> np.ndarray | Unreadable:
        with Image.open(io.BytesIO(data)) as image:
            trouble = self._check_size(image.height, image.width)
            if trouble is not None:
                return trouble
            if image.format == "EPS":
                return Unreadable("unsupported", "EPS is a program, which another program would have to run")
            image.load()
            rgb = self._to_rgb(_upright(image))
        if isinstance(rgb, Unreadable):
            return rgb
        return np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1))

    def _to_rgb(self, image: Image.Image) -> Image.Image | Unreadable:
        if image.mode.startswith("I"):
            return self._from_wide(image)
        if image.mode == "F":
            values = np.asarray(image)
            if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
                return Unreadable("unsupported", "floating-point pixels outside [0, 1]")
            return Image.fromarray(np.round(values * 255).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            top = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", top.size, (*self.background, 255)), top).convert("RGB")
        return image.convert("RGB")

    def _from_wide(self, image: Image.Image) -> Image.Image | Unreadable:
        """16-bit grey, which Pillow holds as ``I;16`` or ``I``, scaled to 8 bits and rounded."""
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            return Unreadable("unsupported", f"integer pixels of mode {image.mode} outside 0..65535")
        rgb = np.repeat(((values * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            rgb[values == transparent] = self.background
        return Image.fromarray(rgb)


def _upright(image: Image.Image) -> Image.Image:
    """As EXIF says; as it is where that is damaged, since the pixels are not."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - SyntaxError, struct.error, ...: whatever Pillow's parser stumbles over
        return image


DIGEST_SIZE = 16


def view_digest(image: np.ndarray) -> bytes:
    """16 bytes of SHA-256 over an image's dtype, shape and pixels: equal only for the same pixels in the same form.

    128 bits make an accidental collision among 10^9 views less likely than 10^-20. SHA-256 rather than
    BLAKE2b, since processors have instructions for it (1.8 against 0.9 GB/s).
    """
    digest = hashlib.sha256(f"{image.dtype.str}{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).reshape(-1).view(np.uint8).data)
    return digest.digest()[:DIGEST_SIZE]
