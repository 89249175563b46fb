"""What encoded images are, beyond what Pillow reads of itself: plug-ins, names of other formats, idle metadata."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

__all__ = ["IMAGE_EXTENSIONS", "Plugin", "foreign_plugins", "has_image_name", "name_format", "without_metadata"]

IMAGE_EXTENSIONS = frozenset(
    {"apng", "avif", "bmp", "dib", "gif", "heic", "heif", "hif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "jxl"}
    | {"pbm", "pgm", "png", "pnm", "ppm", "svg", "tga", "tif", "tiff", "webp"}
)
"""Extensions of names that are taken for images where other files are expected too."""


def has_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its extension, in any case, or by a plug-in's."""
    extension = name.rpartition(".")[2].lower()
    if extension in IMAGE_EXTENSIONS:
        return True
    form = Image.EXTENSION.get(f".{extension}")
    return form in Image.OPEN and _is_foreign(Image.OPEN[form][0])


@dataclass(frozen=True, slots=True)
class Plugin:
    """A format that the caller has registered with Pillow; picklable as its functions are, by the names of modules."""

    form: str
    factory: Any
    accept: Any

    def register(self) -> None:
        """Let Pillow read it in this process, too, and in this way where Pillow has one of its own."""
        if Image.OPEN.get(self.form) != (self.factory, self.accept):
            Image.init()  # or Pillow would register its own formats later, in place of this one
            Image.register_open(self.form, self.factory, self.accept)


def foreign_plugins() -> tuple[Plugin, ...]:
    """Those that are registered here, and are not Pillow's own."""
    found = sorted((form, *entry) for form, entry in Image.OPEN.items() if _is_foreign(entry[0]))
    return tuple(Plugin(form, factory, accept) for form, factory, accept in found)


def _is_foreign(factory: Any) -> bool:
    return not str(getattr(factory, "__module__", "")).startswith("PIL.")


_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_PACKAGES = {
    "HEIC": "the package pillow-heif reads it, once pillow_heif.register_heif_opener() is called",
    "AVIF": "Pillow from 11.3 on reads it, or the package pillow-avif-plugin, once it is imported",
    "JPEG XL": "the package pillow-jxl-plugin reads it, once pillow_jxl is imported",
}
_OTHERS: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    (
        "an SVG drawing, which has no pixels: draw it with a package such as cairosvg",
        lambda data: b"<svg" in data[:4096].lower() and data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"),
    ),
    (
        "a web page, as a failed download leaves it",
        lambda data: data.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith((b"<!doctype html", b"<html")),
    ),
    ("a Git LFS pointer to the file: git lfs pull brings it", lambda data: data.startswith(b"version https://git-lfs")),
    ("a DICOM file: pydicom reads it", lambda data: data[128:132] == b"DICM"),
    ("a PDF document", lambda data: data.startswith(b"%PDF")),
)


def name_format(data: bytes) -> tuple[Literal["unsupported", "corrupt", "not an image"], str] | None:
    """(the kind of trouble, what it is in words) of bytes that Pillow does not identify; None if nor does this."""
    form = None
    if data[4:8] == b"ftyp":  # ISO base media: a major brand, then compatible ones
        brands = {data[8:12], *(data[start : start + 4] for start in range(16, min(64, len(data)), 4))}
        form = "AVIF" if brands & {b"avif", b"avis"} else "HEIC" if brands & _HEIC else None
    elif data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        form = "JPEG XL"
    if form is not None and not any(_accepts(name, data) for name in _REGISTERED[form]):
        remedy = "in the program that calls extract (dinov3-ray extract has --plugin); the workers take it from there"
        return "unsupported", f"{form}; {_PACKAGES[form]} {remedy}"
    for number, (words, fits) in enumerate(_OTHERS):
        if fits(data):
            return ("not an image", "unsupported")[number == 0], words
    form = form or next((name for name in Image.OPEN if _accepts(name, data)), None)
    return None if form is None else ("corrupt", f"damaged, or of a kind of {form} that Pillow does not read")


_REGISTERED = {"HEIC": ("HEIF", "HEIC"), "AVIF": ("AVIF",), "JPEG XL": ("JXL",)}  # names that their plug-ins have


def _accepts(form: str, data: bytes) -> bool:
    """Whether a format is registered with Pillow, and takes these bytes for its own."""
    _, accept = Image.OPEN.get(form, (None, None))
    try:
        return accept is not None and accept(data[:16]) is True
    except Exception:  # noqa: BLE001 - a plug-in's own code, on bytes that may be damaged
        return False


def without_metadata(data: bytes) -> bytes | None:
    """A PNG or JPEG file without what has no say in its pixels; None of another file, or if nothing is left out.

    EXIF stays, since it has the orientation; of PNG texts, those that are short and not compressed, for the same
    reason. Chunks are those of the PNG specification (https://www.w3.org/TR/png-3/#11Chunks), and segments those of
    ITU-T T.81, annex B (https://www.w3.org/Graphics/JPEG/itu-t81.pdf).
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        spans = _png_spans(data)
    elif data.startswith(b"\xff\xd8"):
        spans = _jpeg_spans(data)
    else:
        return None
    bare = b"".join(data[start:stop] for start, stop in spans)
    return bare if len(bare) < len(data) else None


_SHORT = 2**16
_SHORT_IN_ALL = 2**20
_PNG_KEPT = {b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"}


def _png_spans(data: bytes) -> Iterator[tuple[int, int]]:
    yield 0, 8
    start, texts = 8, 0
    while start + 8 <= len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        name = data[start + 4 : start + 8]
        stop = start + 12 + length
        plain = name == b"tEXt" or (name == b"iTXt" and data[start + 8 : stop].partition(b"\0")[2][:1] == b"\0")
        texts += length if plain and length <= _SHORT else 0
        plain = plain and length <= _SHORT and texts <= _SHORT_IN_ALL
        is_critical = not name[:1].islower()
        if is_critical or name in _PNG_KEPT or plain:
            yield start, min(stop, len(data))
        start = stop


def _jpeg_spans(data: bytes) -> Iterator[tuple[int, int]]:
    yield 0, 2
    start = 2
    while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] != 0xDA:
        marker = data[start + 1]
        (length,) = struct.unpack(">H", data[start + 2 : start + 4])
        body = data[start + 4 : start + 10]
        is_application = 0xE0 <= marker <= 0xEF or marker == 0xFE  # or a comment
        # JFIF, and Adobe's, have the colour transform.
        if not is_application or marker in (0xE0, 0xEE) or (marker == 0xE1 and body == b"Exif\0\0"):
            yield start, start + 2 + length
        start += 2 + length
    yield start, len(data)
