"""Decoding: every kind of file that people have, to the same upright RGB pixels, or a reason why not."""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dcar_fast.training.data.examples import BrokenExample
from dcar_fast.training.data.pictures import decode_picture, square
from tests.training.data_files import encoded, picture

RED = (200, 40, 10)


def test_pixels_of_a_png_survive() -> None:
    image = picture(7)
    assert np.array_equal(np.asarray(decode_picture(encoded(image), 16)), np.asarray(image))


def test_exif_orientation_is_applied() -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees: white comes to the top
    decoded = np.asarray(decode_picture(encoded(Image.fromarray(pixels), "PNG", exif=exif), 16))
    assert decoded.shape == (40, 20, 3) and decoded[:20].min() == 255 and decoded[20:].max() == 0


def test_sixteen_bits_are_scaled_down() -> None:
    levels = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (20, 1))
    decoded = np.asarray(decode_picture(encoded(Image.fromarray(levels)), 16))
    assert np.abs(decoded[0, :, 0] - levels[0] / 257).max() <= 0.5


def test_palette_and_its_transparency() -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, *RED])
    image.paste(0, (0, 0, 10, 20))
    decoded = np.asarray(decode_picture(encoded(image, transparency=0), 16))
    assert (decoded[:, :10] == 255).all() and (decoded[:, 10:] == RED).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    image = Image.new(mode, (20, 20), 0)
    assert np.asarray(decode_picture(encoded(image), 16)).min() == 255


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_rgb(mode: str) -> None:
    assert (np.asarray(decode_picture(encoded(Image.new(mode, (20, 20), 255)), 16)) == 255).all()


def test_cmyk_jpeg() -> None:
    decoded = np.asarray(decode_picture(encoded(Image.new("RGB", (20, 20), RED).convert("CMYK"), "JPEG"), 16))
    assert np.abs(decoded.astype(int) - RED).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6, 0.95])
def test_truncated_files_are_broken(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    decode_picture(data, 16)
    with pytest.raises(BrokenExample) as error:
        decode_picture(data[: int(len(data) * share)], 16)
    assert error.value.reason == "unreadable picture"


def test_a_picture_under_sixteen_pixels_is_broken() -> None:
    for width, height in ((1, 1), (15, 300), (300, 15)):
        with pytest.raises(BrokenExample, match=f"too small: {width} x {height}"):
            decode_picture(encoded(picture(0, width, height)), 16)
    assert decode_picture(encoded(picture(0, 16, 300)), 16).size == (16, 300)


def huge_png(side: int) -> bytes:
    """A PNG of a few hundred bytes that claims side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_500, 50_000])  # where Pillow warns, and where it refuses
@pytest.mark.parametrize("limit", ["default", None])
def test_a_decompression_bomb_is_broken(side: int, limit: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit is None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BrokenExample, match="picture too large"):
            decode_picture(huge_png(side), 16)


def test_only_pictures_are_opened() -> None:
    """Pillow would hand a PostScript file of any name to an interpreter."""
    image = picture(0)
    for kind in ("EPS", "PPM", "PCX"):
        with pytest.raises(BrokenExample, match="unreadable picture: cannot identify"):
            decode_picture(encoded(image, kind), 16)


def test_float_pictures_have_no_known_range() -> None:
    with pytest.raises(BrokenExample, match="no known range"):
        decode_picture(encoded(Image.fromarray(np.ones((20, 20), np.float32)), "TIFF"), 16)


def test_a_square_of_its_own_size_is_kept_bit_for_bit() -> None:
    image = picture(3, 16, 16)
    assert np.array_equal(square(image, 16), np.asarray(image))


def test_the_middle_is_taken() -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    assert np.array_equal(square(Image.fromarray(pixels), 16), pixels[:, 16:32])
    assert np.array_equal(square(Image.fromarray(pixels.transpose(1, 0, 2)), 16), pixels[:, 16:32].transpose(1, 0, 2))


def test_it_shrinks_without_aliasing_and_enlarges() -> None:
    board = np.indices((256, 256)).sum(0) % 2 * 255
    small = square(Image.fromarray(np.stack([board] * 3, 2).astype(np.uint8)), 16)
    assert np.abs(small.astype(int) - 127.5).max() < 3
    assert square(picture(1, 17, 30), 64).shape == (64, 64, 3)


def test_a_jpeg_decoded_at_a_fraction_is_nearly_the_same() -> None:
    ramp = np.linspace(0, 255, 512)
    pixels = np.stack([np.tile(ramp, (512, 1)), np.tile(ramp[:, None], (1, 512)), np.full((512, 512), 90.0)], 2)
    image = Image.fromarray(pixels.astype(np.uint8))
    decoded = decode_picture(encoded(image, "JPEG", quality=95), 64)
    assert decoded.size == (128, 128)
    assert np.abs(square(decoded, 64).astype(int) - square(image, 64)).max() <= 4


def test_crops_and_flips_are_drawn() -> None:
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    firsts, mirrored = set(), 0
    for i in range(200):
        row = square(ramp, 16, np.random.default_rng(i), random_crop=True, flip=True)[0, :, 0].astype(int)
        mirrored += row[0] > row[-1]
        firsts.add(int(row.min()))
    assert 70 < mirrored < 130 and min(firsts) <= 1 and max(firsts) >= 46 and len(firsts) > 35
    again = [square(ramp, 16, np.random.default_rng(9), random_crop=True, flip=True) for _ in range(2)]
    assert np.array_equal(*again)
