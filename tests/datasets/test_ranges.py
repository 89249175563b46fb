"""Ranges, depths and kinds of pixels that files and arrays have: a picture as it is meant, or the reason why not."""

from __future__ import annotations

import io
import json
import multiprocessing
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin
from test_decode import GREY, PHOTO, decoded, encoded, refused

from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.datasets.formats import foreign_plugins

Image.init()  # or Image.SAVE has no AVIF yet, which Pillow writes from 11.3 on


def tiff(array: np.ndarray, photometric: str, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric=photometric, **options)
    return file.getvalue()


def wide_png(array: np.ndarray) -> bytes:
    """16-bit grey with alpha, RGB or RGBA: [H,W,C], as Pillow cannot write it: signature, IHDR, IDAT, IEND."""
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    kind = {2: 4, 3: 2, 4: 6}[array.shape[2]]
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def pnm(array: np.ndarray, most: int = 65535) -> bytes:
    body = array.astype(">u2" if most > 255 else np.uint8).tobytes()
    return b"P%d %d %d %d\n" % (6 if array.ndim == 3 else 5, array.shape[1], array.shape[0], most) + body


def opaque(colours: np.ndarray) -> np.ndarray:
    return np.dstack([colours, np.full(colours.shape[:2], np.iinfo(colours.dtype).max, colours.dtype)])


WIDE_FORMS = {
    "array grey": lambda wide: wide[..., 1],
    "array RGB": lambda wide: wide,
    "array RGBA": opaque,
    "array grey and alpha": lambda wide: opaque(wide[..., 1]),
    "PNG grey": lambda wide: encoded(Image.fromarray(wide[..., 1]), "PNG"),
    "PNG grey and alpha": lambda wide: wide_png(opaque(wide[..., 1])),
    "PNG RGB": wide_png,
    "PNG RGBA": lambda wide: wide_png(opaque(wide)),
    "TIFF grey": lambda wide: tiff(wide[..., 1], "minisblack"),
    "TIFF RGB": lambda wide: tiff(wide, "rgb"),
    "TIFF RGB, big-endian": lambda wide: tiff(wide, "rgb", byteorder=">"),
    "TIFF RGB, compressed": lambda wide: tiff(wide, "rgb", compression="zlib"),
    "TIFF RGBA": lambda wide: tiff(opaque(wide), "rgb", extrasamples=["unassalpha"]),
    "PGM": lambda wide: pnm(wide[..., 1]),
    "PPM": pnm,
}


@pytest.mark.parametrize("form", WIDE_FORMS)
@pytest.mark.parametrize(
    ("most", "kept"), [(1, False), (255, False), (4095, False), (8191, True), (32767, True), (65535, True)]
)
def test_16_bits_are_a_picture_where_they_use_more_than_12(form: str, most: int, kept: bool) -> None:
    values = np.linspace(0, most, PHOTO.size).round().astype(np.uint16).reshape(PHOTO.shape)
    made = WIDE_FORMS[form](values)
    found = Decoder().take(made) if isinstance(made, np.ndarray) else Decoder().decode(made)
    if not kept:
        assert isinstance(found, Unreadable)
        assert found.kind == "unsupported"
        return
    assert isinstance(found, np.ndarray), found
    same = values if "RGB" in form or form == "PPM" else np.repeat(values[..., 1:2], 3, axis=2)
    assert np.abs(found.transpose(1, 2, 0) - same / 257.0).max() <= 1


def test_a_range_that_the_file_names_is_taken() -> None:
    values = np.linspace(0, 4095, PHOTO.size).round().astype(np.uint16).reshape(PHOTO.shape)
    assert np.abs(decoded(pnm(values, 4095)) - values / 4095.0 * 255).max() <= 1
    assert np.abs(decoded(pnm(values[..., 1], 4095))[..., 0] - values[..., 1] / 4095.0 * 255).max() <= 1
    bits = (GREY > 100).astype(np.uint8)
    assert np.array_equal(decoded(pnm(bits, 1))[..., 0], bits * 255)
    lines = np.dstack([np.zeros_like(values), np.where(GREY > 100, 65535, 0).astype(np.uint16)])
    shown = decoded(wide_png(lines))
    assert shown.min() == 0, "black lines on a transparent ground are a picture"
    assert shown.max() == 255


MASK = (GREY > 100).astype(np.uint8)


@pytest.mark.parametrize(
    "made",
    [
        MASK,
        MASK.astype(np.int64),
        np.dstack([MASK] * 3),
        opaque(MASK),
        np.dstack([MASK] * 4),
        MASK / np.float32(255),
        encoded(Image.fromarray(MASK), "PNG"),
        encoded(Image.fromarray(np.dstack([MASK] * 3)), "PNG"),
        encoded(Image.fromarray(opaque(np.dstack([MASK] * 3))), "PNG"),
        pnm(MASK, 255),
        tiff(MASK, "minisblack"),
        tiff(MASK / np.float32(255), "minisblack"),
    ],
)
def test_masks_of_0_and_1_are_not_nearly_black_pictures(made: np.ndarray | bytes) -> None:
    found = Decoder().take(made) if isinstance(made, np.ndarray) else Decoder().decode(made)
    assert isinstance(found, Unreadable)
    assert found.kind == "unsupported"
    assert ": black if their range is" in found.detail


def test_dark_pictures_and_palettes_are_not_masks() -> None:
    for dark in (MASK * 2, MASK * 0, np.ones((1, 1), np.uint8)):
        assert isinstance(Decoder().take(dark), np.ndarray)
        assert isinstance(Decoder().decode(encoded(Image.fromarray(dark), "PNG")), np.ndarray)
    palette = Image.fromarray(MASK).convert("P")
    palette.putpalette([0, 0, 0, 200, 10, 30])
    assert set(np.unique(decoded(encoded(palette, "PNG")))) == {0, 10, 30, 200}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_whose_white_is_0_is_shown_as_it_is_meant(dtype: type, compression: str | None) -> None:
    most = 1 if dtype == np.float32 else np.iinfo(dtype).max
    values = (np.linspace(0, 1, GREY.size).reshape(GREY.shape) * most).astype(dtype)
    shown = decoded(tiff(values, "miniswhite", compression=compression))[..., 0]
    assert np.abs(shown - (255 - values / most * 255)).max() <= 1


def test_tiff_that_pillow_misreads_is_refused() -> None:
    assert "signed 8-bit" in refused(tiff(GREY.astype(np.int8), "minisblack")).detail
    planes = (PHOTO.astype(np.uint16) * 257).transpose(2, 0, 1).copy()
    assert "separate planes" in refused(tiff(planes, "rgb", planarconfig="separate")).detail
    assert np.array_equal(decoded(tiff(planes, "rgb", planarconfig="separate", compression="zlib")), PHOTO)


def broken_adobe() -> bytes:
    jpeg = encoded(Image.fromarray(PHOTO), "JPEG")
    return jpeg[:2] + b"\xff\xee\0\x08Adobe\0" + jpeg[2:]


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (tiff(np.dstack([GREY] * 5), "minisblack", planarconfig="contig"), "TIFF"),
        (tiff(GREY.astype(np.float16), "minisblack"), "TIFF"),
        (tiff(GREY.astype(np.float64), "minisblack"), "TIFF"),
        (encoded(Image.fromarray(PHOTO), "TIFF")[:30], "TIFF"),
        (encoded(Image.fromarray(PHOTO), "PNG")[:20], "PNG"),
        (encoded(Image.fromarray(GREY), "GIF")[:10], "GIF"),
        (broken_adobe(), "JPEG"),
        *([(encoded(Image.fromarray(PHOTO), "AVIF")[:60], "AVIF")] if "AVIF" in Image.SAVE else []),
    ],
)
def test_an_image_that_pillow_cannot_open_is_still_an_image(data: bytes, form: str) -> None:
    trouble = refused(data)
    assert trouble.kind != "not an image", trouble
    assert form in trouble.detail or trouble.kind == "truncated"
    assert "package" not in trouble.detail
    assert "plugin" not in trouble.detail


def test_too_little_memory_is_not_a_too_large_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*_: object) -> object:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(PngImagePlugin.PngImageFile, "load", starved)
        assert refused(encoded(Image.fromarray(PHOTO), "PNG")).kind == "out of memory"
    monkeypatch.setattr(Decoder, "_to_rgb", starved)
    assert refused(encoded(Image.fromarray(PHOTO), "PNG")).kind == "out of memory"


class OtherPng(PngImagePlugin.PngImageFile):
    """A plug-in for a format that Pillow has, too: it shows all in blue."""

    def load(self) -> object:
        found = super().load()
        self.im = Image.new("RGB", self.size, "blue").im
        return found


def is_png(prefix: bytes) -> bool:
    return prefix.startswith(b"\x89PNG")


def reads(decoder: Decoder, data: bytes) -> object:
    """What a process that has just started makes of ``data``."""
    return decoder.decode(data)


@pytest.mark.slow
def test_plugins_for_pillows_own_formats_go_along_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    Image.register_open("PNG", OtherPng, is_png)
    named = Decoder(plugins=foreign_plugins())
    again = Decoder.from_rules(json.loads(json.dumps(named.describe())))
    assert [plugin.form for plugin in again.plugins] == ["PNG"]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for decoder in (named, again):
            shown = pool.submit(reads, decoder, encoded(Image.fromarray(PHOTO), "PNG")).result()
            assert isinstance(shown, np.ndarray), shown
            assert (shown[2] == 255).all()
            assert not shown[:2].any()
