"""Between PIL images, tensors in [-1, 1] and masks over tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from dcar_fast._files import write_atomically

MAX_SIDE = 4096  # pixels


def image_to_tensor(image: Image.Image, name: str = "image") -> Tensor:
    """PIL image -> (1, 3, H, W) float32 in [-1, 1].

    Any mode of 8 bits per channel, transparency laid over white; grey of 16 bits is scaled down. ``ValueError`` for
    float and 32-bit images, whose range nobody knows.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} must be a PIL image, got {type(image).__name__}")
    pixels = torch.from_numpy(np.array(to_rgb(image, name)))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """A PIL image in mode "RGB", converted as :func:`image_to_tensor` says."""
    return _opaque(_to_8_bits(image, name)).convert("RGB")


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # PNG has 16 bits at most
        levels = np.asarray(image).astype(np.uint16)
        return Image.fromarray((levels / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{name} has 32 bits per pixel (mode {image.mode}) and no known range; convert it to 8 bits")
    return image


def _opaque(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def image_to_multiple(image: Image.Image, multiple: int, pad: bool) -> Tensor:
    """:func:`image_to_tensor` with sides that are multiples of ``multiple``.

    Others are padded with their repeated edges (right and bottom) if ``pad``, else a ``ValueError``.
    """
    if isinstance(image, Image.Image) and max(image.size) > MAX_SIDE:
        width, height = image.size
        raise ValueError(f"image must be at most {MAX_SIDE} pixels a side, got {width} x {height}")
    pixels = image_to_tensor(image)
    height, width = pixels.shape[2:]
    if (height % multiple or width % multiple) and not pad:
        near = " x ".join(str(max(multiple, side // multiple * multiple)) for side in (width, height))
        raise ValueError(f"image: sides must be multiples of {multiple}, got {width} x {height}; crop to {near} or pad")
    rows, columns = (torch.arange(-(-n // multiple) * multiple).clamp(max=n - 1) for n in (height, width))
    return pixels[:, :, rows][:, :, :, columns]


def tensor_to_pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W) nominally in [-1, 1] -> (B, H, W, 3) uint8: * 0.5 + 0.5, clamped, rounded to the nearest level."""
    levels = (images.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1)


def mask_to_tensor(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """PIL mask, white (>= 128) where the image is to be repainted -> (H, W) bool. Its size must be ``size`` (W, H)."""
    if not isinstance(mask, Image.Image):
        raise ValueError(f"mask must be a PIL image, got {type(mask).__name__}")
    if mask.size != size:
        raise ValueError(f"mask must be as large as the image (width, height) = {size}, got {mask.size}")
    return torch.from_numpy(np.array(_to_8_bits(mask, "mask").convert("L")) >= 128)


def mask_to_tokens(mask: Tensor, compression: int) -> Tensor:
    """(H, W) bool pixels -> (H/f, W/f) bool tokens: every token the mask overlaps and its eight neighbours."""
    overlapped = F.max_pool2d(mask[None, None].float(), compression)
    return F.max_pool2d(overlapped, 3, stride=1, padding=1)[0, 0].bool()


def open_image(path: str | Path) -> Image.Image:
    """An image file, upright; ``ValueError`` if it is missing or no readable image."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no readable image: {error}") from error


def save_png(image: Image.Image, path: str | Path) -> None:
    """Writes a PNG atomically; the strings in ``image.info`` (prompt, seed, settings) become its text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in image.info.items():
        if isinstance(key, str) and isinstance(value, str):
            chunks.add_itxt(key, value)
    write_atomically(Path(path), lambda temporary: image.save(temporary, format="PNG", pnginfo=chunks))
