"""From the bytes of an image file to a square of uint8 RGB, or :class:`BrokenExample` with the reason."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dcar_fast.images import to_rgb
from dcar_fast.training.data.examples import BrokenExample

MIN_SIDE = 16
"""Pixels; a smaller picture shows nothing at any training size, it is left out."""
MAX_PIXELS = 89_478_485
"""A larger picture counts as a decompression bomb (Pillow's own limit, whatever a program sets it to)."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded, whatever the file's name; among Pillow's others is one that runs an interpreter (EPS)."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def decode_picture(data: bytes, size: int) -> Image.Image:
    """An image file's bytes -> upright PIL image in mode "RGB", transparency laid over white; of animations the first.

    A JPEG much larger than a square of ``size`` pixels needs is decoded at 1/2, 1/4 or 1/8, never below 2 ``size``.
    :class:`BrokenExample` for what is damaged, truncated, below MIN_SIDE, above MAX_PIXELS or of unknown range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenExample("picture too large", error) from error
    except UnidentifiedImageError as error:  # its message names a buffer in memory
        raise BrokenExample("unreadable picture", "cannot identify its format") from error
    except Exception as error:  # whatever else Pillow raises for damaged files
        raise BrokenExample("unreadable picture", error) from error
    width, height = image.size
    if min(image.size) < MIN_SIDE:
        raise BrokenExample("picture too small", f"{width} x {height}, sides must be at least {MIN_SIDE} pixels")
    if width * height > MAX_PIXELS:
        raise BrokenExample("picture too large", f"{width} x {height}, {MAX_PIXELS} pixels are allowed")
    try:
        image.draft(None, (2 * size, 2 * size))
        image.load()
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # a copy forgets it; it tells the range of 16-bit PNGs
        return to_rgb(upright)
    except Exception as error:  # as above, and the ValueError of to_rgb
        raise BrokenExample("unreadable picture", error) from error


def square(
    image: Image.Image,
    size: int,
    rng: np.random.Generator | None = None,
    random_crop: bool = False,
    flip: bool = False,
) -> np.ndarray:
    """The largest square of an RGB image, resized (Lanczos, anti-aliased) -> (size, size, 3) uint8.

    The same as resizing the shorter side and cropping, to a fraction of a pixel, at a fraction of the cost.
    random_crop: the square lies anywhere, else in the middle; flip: mirrored with probability 1/2. Both draw from
    ``rng``.
    """
    side = min(image.size)
    u, v, mirror = rng.random(3) if rng is not None else (0.5, 0.5, 1.0)
    if not random_crop:
        u = v = 0.5
    left, top = u * (image.width - side), v * (image.height - side)
    resized = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    pixels = np.asarray(resized)
    return np.ascontiguousarray(pixels[:, ::-1]) if flip and mirror < 0.5 else pixels
