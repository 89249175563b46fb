"""Image bytes to pixels: every kind of image as people see it, every kind of damage with its reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import skimage.data
from picturefiles import bomb_bytes
from PIL import Image

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
    for wrong in (PHOTO.astype(np.float32), PHOTO[None], np.zeros((4, 4, 5), np.uint8), PHOTO.astype(str)):
        assert isinstance(decoder.take(wrong), Unreadable)


def test_read_raises_with_the_name_and_the_reason() -> None:
    with pytest.raises(InputError, match=r"cats/1\.jpg cannot be read as an image \(empty\)"):
        Decoder().read(b"", "cats/1.jpg")


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match="max_pixels must be an integer, at least 1; got 0"):
        Decoder(max_pixels=0)
    with pytest.raises(ConfigError, match="background must be three integers"):
        Decoder(background=(0, 0, 256))
