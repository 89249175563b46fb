"""Image bytes to pixels: every kind of image as people see it, every kind of damage with its reason."""

from __future__ import annotations

import io
import json
import multiprocessing
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import skimage.data
import tifffile
from picturefiles import bomb_bytes
from PIL import Image, PngImagePlugin, TiffImagePlugin

from dinov3_ray.datasets.decode import Decoder, Unreadable
from dinov3_ray.datasets.formats import foreign_plugins
from dinov3_ray.errors import ConfigError, InputError

PHOTO = skimage.data.astronaut()[:120, :200]  # uint8 [120, 200, 3]


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded(data: bytes, decoder: Decoder | None = None) -> np.ndarray:
    image = (decoder or Decoder()).decode(data)
    assert isinstance(image, np.ndarray), image
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[0] == 3
    assert image.flags.c_contiguous
    return image.transpose(1, 2, 0)


def refused(data: bytes, decoder: Decoder | None = None) -> Unreadable:
    trouble = (decoder or Decoder()).decode(data)
    assert isinstance(trouble, Unreadable)
    assert trouble.detail
    return trouble


def test_rgb_png_is_taken_bit_for_bit() -> None:
    assert np.array_equal(decoded(encoded(Image.fromarray(PHOTO), "PNG")), PHOTO)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_rgb_stays_near(form: str) -> None:
    assert np.abs(decoded(encoded(Image.fromarray(PHOTO), form, quality=95)).astype(int) - PHOTO).mean() < 4


def test_grey_is_repeated() -> None:
    grey = np.asarray(Image.fromarray(PHOTO).convert("L"))
    assert np.array_equal(decoded(encoded(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, axis=2))


def test_bilevel_is_black_and_white() -> None:
    image = decoded(encoded(Image.fromarray(PHOTO).convert("1"), "PNG"))
    assert set(np.unique(image)) == {0, 255}


def test_palette_shows_its_colours() -> None:
    palette = Image.fromarray(PHOTO).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(decoded(encoded(palette, "GIF")), np.asarray(palette.convert("RGB")))


def test_palette_transparency_shows_the_background() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 2), 1)
    image = decoded(encoded(palette, "PNG", transparency=0))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[2, 1].tolist() == [0, 0, 255]


def test_cmyk_jpeg_has_the_colours_of_the_original() -> None:
    image = decoded(encoded(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(image.astype(int) - PHOTO).mean() < 6


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form: str) -> None:
    ramp = np.linspace(0, 65535, 256 * 4).round().astype(np.uint16).reshape(4, 256)
    image = decoded(encoded(Image.fromarray(ramp), form))
    expected = np.round(ramp / 257).astype(np.uint8)
    assert np.array_equal(image, np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_grey_shows_the_background_where_it_is_transparent() -> None:
    values = np.full((40, 50), 20_000, np.uint16)
    values[:10] = 7
    data = encoded(Image.fromarray(values), "PNG", transparency=7)
    shown = decoded(data, Decoder(background=(1, 2, 3)))
    assert (shown[:10] == (1, 2, 3)).all()
    assert (shown[10:] == 78).all()


def test_eps_runs_no_other_program() -> None:
    assert refused(encoded(Image.fromarray(PHOTO), "EPS")).kind == "unsupported"


def test_16_bit_rgb_keeps_its_high_bytes() -> None:
    # Pillow cannot write 48-bit PNG, so the file is put together here: signature, IHDR, IDAT, IEND.
    wide = PHOTO.astype(">u2") * 257
    lines = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", PHOTO.shape[1], PHOTO.shape[0], 16, 2, 0, 0, 0)
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    assert np.array_equal(decoded(b"\x89PNG\r\n\x1a\n" + png), PHOTO)


def test_float_tiff_is_taken_as_0_to_1() -> None:
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert np.array_equal(decoded(encoded(Image.fromarray(grey), "TIFF"))[..., 0], np.round(grey * 255))
    assert refused(encoded(Image.fromarray(grey * 7), "TIFF")).kind == "unsupported"


@pytest.mark.parametrize(("background", "shown"), [((255, 255, 255), [255, 127, 127]), ((0, 0, 0), [128, 0, 0])])
def test_alpha_is_composited_on_the_background(background: tuple[int, int, int], shown: list[int]) -> None:
    image = Image.new("RGBA", (5, 4), (255, 0, 0, 128))
    image.putpixel((0, 0), (0, 200, 0, 0))
    pixels = decoded(encoded(image, "PNG"), Decoder(background=background))
    assert pixels[0, 0].tolist() == list(background)
    assert pixels[3, 3].tolist() == shown


def test_grey_with_alpha() -> None:
    pixels = decoded(encoded(Image.new("LA", (3, 3), (10, 0)), "PNG"))
    assert (pixels == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(PHOTO)
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encoded(stored, "PNG", exif=exif)), PHOTO)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_does_not_cost_the_image(form: str) -> None:
    data = encoded(Image.fromarray(PHOTO), form, exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xffdamaged")
    assert decoded(data).shape == PHOTO.shape
    junk = encoded(Image.fromarray(PHOTO), form, exif=b"Exif\x00\x00 no TIFF header")
    assert np.array_equal(decoded(junk), decoded(encoded(Image.fromarray(PHOTO), form)))


def test_an_animation_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (6, 6), "red"), Image.new("RGB", (6, 6), "blue")
    data = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    assert decoded(data)[0, 0].tolist() == [255, 0, 0]


def test_damage_has_its_reason() -> None:
    jpeg, png = (encoded(Image.fromarray(PHOTO), form) for form in ("JPEG", "PNG"))
    assert refused(b"").kind == "empty"
    assert refused(b"this is a text file, whatever its name says").kind == "not an image"
    assert refused(jpeg[: len(jpeg) // 2]).kind == "truncated"
    assert refused(png[: len(png) // 2]).kind == "truncated"
    broken = bytearray(png)
    broken[60:70] = bytes(10)
    assert refused(bytes(broken)).kind == "corrupt"
    assert refused(encoded(Image.new("L", (9, 7)), "PNG"), Decoder(min_side=8)).kind == "too small"


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    bomb = bomb_bytes()
    assert len(bomb) < 200_000
    assert refused(bomb).kind == "too large"
    assert refused(encoded(Image.new("L", (11, 10)), "PNG"), Decoder(max_pixels=109)).kind == "too large"
    assert decoded(encoded(Image.new("L", (11, 10)), "PNG"), Decoder(max_pixels=110)).shape == (10, 11, 3)


def test_no_damage_raises_or_hangs() -> None:
    generator = np.random.default_rng(0)
    forms = [encoded(Image.fromarray(PHOTO[:40, :40]), form) for form in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")]
    for trial in range(300):
        data = bytearray(forms[trial % len(forms)])
        for place in generator.integers(0, len(data), 4):
            data[place] = generator.integers(0, 256)
        image = Decoder().decode(bytes(data[: generator.integers(1, len(data) + 1)]))
        assert isinstance(image, Unreadable) or image.shape[0] == 3


def test_decoded_arrays_are_brought_to_chw() -> None:
    decoder = Decoder()
    for form in (PHOTO, PHOTO.transpose(2, 0, 1)):
        assert np.array_equal(decoder.take(form), PHOTO.transpose(2, 0, 1))
    assert np.array_equal(decoder.take(PHOTO[..., 0]), np.repeat(PHOTO[None, ..., 0], 3, axis=0))
    for wrong in (PHOTO.astype(np.float32), PHOTO[None], np.zeros((6, 6, 5), np.uint8)):
        assert isinstance(decoder.take(wrong), Unreadable)


GREY = PHOTO[..., 1]
ALPHA = np.linspace(0, 255, GREY.size).reshape(GREY.shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("array", "mode"),
    [
        (np.dstack([PHOTO, ALPHA]), "RGBA"),
        (np.dstack([PHOTO, ALPHA]).transpose(2, 0, 1), "RGBA"),
        (np.dstack([GREY, ALPHA]), "LA"),
        (PHOTO.astype(np.uint16) * 257, "RGB"),
        (GREY.astype(np.uint16) * 257, "L"),
        (PHOTO / 255, "RGB"),
        (PHOTO.astype(np.float32) / 255, "RGB"),
        (np.dstack([PHOTO, ALPHA]).astype(np.float16) / np.float16(255), "RGBA"),
        (PHOTO.astype(np.int64), "RGB"),
    ],
)
def test_decoded_arrays_are_what_files_of_the_same_pixels_are(array: np.ndarray, mode: str) -> None:
    decoder = Decoder(background=(10, 200, 30))
    same = {"RGBA": np.dstack([PHOTO, ALPHA]), "LA": np.dstack([GREY, ALPHA]), "RGB": PHOTO, "L": GREY}[mode]
    taken = decoder.take(array)
    assert isinstance(taken, np.ndarray), taken
    assert taken.dtype == np.uint8
    assert taken.flags.c_contiguous
    assert np.array_equal(taken.transpose(1, 2, 0), decoded(encoded(Image.fromarray(same), "PNG"), decoder))


def test_bool_arrays_are_black_and_white() -> None:
    taken = Decoder().take(GREY > 100)
    assert isinstance(taken, np.ndarray)
    assert np.array_equal(taken[0] == 255, GREY > 100)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (PHOTO.astype(np.float32), "outside [0, 1]"),
        (np.full((4, 4), np.nan, np.float32), "outside [0, 1]"),
        (GREY.astype(np.uint16) * 15, "the largest is 3450: black if their range is that of their type"),
        (PHOTO.astype(np.uint16), "pixels of uint16 of which the largest is 2"),
        (GREY.astype(np.int32) * 1000, "outside 0..65535"),
        (GREY.astype(np.int16) - 9, "outside 0..65535"),
        (PHOTO.astype(str), "must be numbers"),
    ],
)
def test_arrays_whose_range_leaves_their_meaning_open_are_refused(array: np.ndarray, words: str) -> None:
    trouble = Decoder().take(array)
    assert isinstance(trouble, Unreadable)
    assert trouble.kind == "unsupported"
    assert words in trouble.detail


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
        (encoded(Image.fromarray(PHOTO), "AVIF")[:60], "AVIF"),
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


def test_files_of_12_bits_in_16_are_refused_and_black_ones_are_not() -> None:
    narrow = encoded(Image.fromarray(GREY.astype(np.uint16) * 15), "TIFF")
    assert "of which the largest is 3" in refused(narrow).detail
    mask = encoded(Image.fromarray((GREY // 20).astype(np.int32)), "TIFF")
    assert refused(mask).kind == "unsupported"
    assert not decoded(encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG")).any()


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported", "HEIC; the package pillow-heif reads it"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0avifmif1", "unsupported", "AVIF; Pillow from 11.3 on"),
        (b"\0\0\0\x0cJXL \r\n\x87\n....", "unsupported", "JPEG XL; the package pillow-jxl-plugin"),
        (b"\xff\x0a" + bytes(20), "unsupported", "JPEG XL"),
        (
            b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
            "unsupported",
            "an SVG drawing",
        ),
        (b"\n<!DOCTYPE html><html>404</html>", "not an image", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "not an image", "git lfs pull brings it"),
        (bytes(128) + b"DICM" + bytes(9), "not an image", "pydicom"),
        (b"%PDF-1.7", "not an image", "a PDF document"),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp41", "not an image", "no image format that Pillow knows"),
    ],
)
def test_what_pillow_does_not_read_is_named(
    data: bytes, kind: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {form: entry for form, entry in Image.OPEN.items() if form != "AVIF"})
    monkeypatch.setattr(Image, "ID", [form for form in Image.ID if form != "AVIF"])
    trouble = refused(data)
    assert trouble.kind == kind
    assert words in trouble.detail


def test_a_preview_in_a_camera_raw_file_is_not_the_picture() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1  # NewSubfileType: a reduced-resolution version
    assert "camera raw" in refused(encoded(Image.fromarray(PHOTO), "TIFF", tiffinfo=tags)).detail


def png_with(*chunks: tuple[bytes, bytes], after: tuple[bytes, bytes] | None = None) -> bytes:
    """PHOTO as PNG, with more chunks after its header, and one after its pixels."""
    png = encoded(Image.fromarray(PHOTO), "PNG")
    extra, last = (
        b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in some
        )
        for some in (chunks, [after] if after else [])
    )
    return png[:33] + extra + png[33:-12] + last + png[-12:]


LONG = zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"comment\0\0" + LONG),
        (b"iTXt", b"comment\0\1\0\0\0" + LONG),
        (b"iCCP", b"profile\0\0" + LONG),
        (b"tEXt", b"comment\0" + bytes(70_000_000)),
        (b"pHYs", b"cut"),
        (b"gAMA", b""),
    ],
)
def test_png_metadata_that_nobody_reads_never_decide(chunk: tuple[bytes, bytes]) -> None:
    assert np.array_equal(decoded(png_with(chunk)), PHOTO)
    assert np.array_equal(decoded(png_with(after=chunk)), PHOTO)


def test_png_texts_that_are_short_but_many_never_decide() -> None:
    pieces = [(b"tEXt", b"comment\0" + bytes(60_000))] * 1200
    assert np.array_equal(decoded(png_with(*pieces)), PHOTO)


def test_where_metadata_are_left_out_orientation_and_transparency_stay() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png_with(
        (b"zTXt", b"comment\0\0" + LONG), (b"eXIf", exif.tobytes()[6:]), (b"tRNS", struct.pack(">3H", *PHOTO[5, 7]))
    )
    expected = np.where((PHOTO[5, 7] == PHOTO).all(axis=2, keepdims=True), 255, PHOTO)
    assert np.array_equal(decoded(data), np.rot90(expected, -1))


def test_jpeg_metadata_that_nobody_reads_never_decide() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    plain = encoded(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", exif=exif)
    index = b"MPF\0II*\0\x08\0\0\0" + struct.pack(
        "<HHHIII", 1, 0xB000, 7, 4, 0x30303130, 0
    )  # without its number of images
    for marker, body in ((b"\xff\xe2", index), (b"\xff\xed", b"Photoshop 3.0\0008BIM"), (b"\xff\xfe", b"comment")):
        segment = marker + struct.pack(">H", len(body) + 2) + body
        assert np.array_equal(decoded(plain[:2] + segment + plain[2:]), decoded(plain)), marker


def test_an_image_beyond_pillows_limit_is_read_where_max_pixels_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PHOTO.shape[0] * PHOTO.shape[1] // 3)
    for form in ("PNG", "TIFF", "GIF", "WEBP", "BMP", "JPEG2000", "JPEG", "TGA"):
        data = encoded(Image.fromarray(PHOTO), form)
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(data))
        assert decoded(data).shape == PHOTO.shape, form
    assert Image.MAX_IMAGE_PIXELS is not None, "the limit of the process stays"
    assert refused(data, Decoder(max_pixels=100)).kind == "too large"


@pytest.mark.slow
def test_200_megapixels_take_7_bytes_each() -> None:
    code = (
        "import resource, sys; from dinov3_ray.datasets.decode import Decoder; data = sys.stdin.buffer.read();"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; image = Decoder(max_pixels=10**9).decode(data);"
        "print(image.shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / image[0].size)"
    )
    data = encoded(Image.new("RGB", (20_000, 10_000), (1, 2, 3)), "PNG", compress_level=1)
    shown = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True).stdout.decode()
    shape, _, bytes_each = shown.rpartition(" ")
    assert shape == "(3, 10000, 20000)"
    assert float(bytes_each) < 7.5


def test_shrinking_leaves_at_least_so_many_pixels() -> None:
    big = Image.fromarray(PHOTO).resize((805, 1203))
    for form in ("JPEG", "PNG", "WEBP"):
        data = encoded(big, form)
        for least, shape in (
            (806, (1203, 805)),
            (402, (602, 403)),
            (201, (301, 202)),
            (100, (151, 101)),
            (1, (151, 101)),
        ):
            small = decoded(data, Decoder(shrink_to=least))
            assert small.shape[:2] == shape, (form, least)
            reference = np.asarray(big.resize(shape[::-1], Image.Resampling.BOX)).astype(int)
            assert np.abs(small - reference).mean() < 8, form
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decoded(encoded(big, "JPEG", exif=exif), Decoder(shrink_to=100))
    assert np.array_equal(turned, np.rot90(decoded(encoded(big, "JPEG"), Decoder(shrink_to=100)), -1))


def test_strips_are_seamless() -> None:
    large = np.asarray(Image.fromarray(PHOTO).resize((3001, 401)))  # of several strips, and none of them whole
    assert np.array_equal(decoded(encoded(Image.fromarray(large), "PNG", compress_level=1)), large)
    shrunk = decoded(encoded(Image.fromarray(large), "PNG", compress_level=1), Decoder(shrink_to=100))
    assert np.array_equal(shrunk, np.asarray(Image.fromarray(large).reduce(4)))
    grey = np.asarray(Image.fromarray(large).convert("L")).astype(np.uint16) * 257
    assert np.array_equal(decoded(encoded(Image.fromarray(grey), "TIFF"))[..., 0], grey // 257)


def test_a_bug_of_this_package_is_no_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(PHOTO), "PNG")
    for name in ("_check_size", "_pixels", "_to_rgb"):
        with monkeypatch.context() as patched:
            patched.setattr(Decoder, name, property(lambda self: self.misspelt))
            with pytest.raises(AttributeError, match="misspelt"):
                Decoder().decode(data)


def test_a_plugin_that_stumbles_is_an_image_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(file: object, name: str) -> object:
        raise AttributeError("in somebody else's code")

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    Image.register_open("STUMBLING", stumble, lambda prefix: prefix.startswith(b"stumbling"))
    assert refused(b"stumbling...").kind == "corrupt"


def test_rules_come_back_from_the_manifest() -> None:
    decoder = Decoder(1000, 16, (1, 2, 3), shrink_to=448)
    assert Decoder.from_rules(json.loads(json.dumps(decoder.describe()))) == decoder
    assert Decoder.from_rules({"max_pixels": 9, "min_side": 1, "background": [0, 0, 0]}).shrink_to is None


def test_read_raises_with_the_name_and_the_reason() -> None:
    with pytest.raises(InputError, match=r"cats/1\.jpg cannot be read as an image \(empty\)"):
        Decoder().read(b"", "cats/1.jpg")


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match="max_pixels must be an integer, at least 1; got 0"):
        Decoder(max_pixels=0)
    with pytest.raises(ConfigError, match="background must be three integers"):
        Decoder(background=(0, 0, 256))
