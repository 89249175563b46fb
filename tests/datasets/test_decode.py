"""Image bytes to pixels: every kind of image as people see it, every kind of damage with its reason."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import skimage.data
from picturefiles import bomb_bytes
from PIL import Image, TiffImagePlugin

from dinov3_ray.datasets.decode import Decoder, Unreadable
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
