"""Pictures of pictures: labelled rows for the training log."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dcar_fast.images import tensor_to_pixels

GAP = 2  # pixels between pictures
LABEL = 14  # height of a row's label


def image_grid(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Rows of pictures, each under its label: (label, images (B, 3, H, W) float, nominally in [-1, 1]).

    All rows must be of one size; white background, pictures as they are, unscaled.
    """
    shapes = {tuple(images.shape) for _, images in rows}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise ValueError(f"rows must be labelled images (B, 3, H, W) of one size, got {sorted(shapes)}")
    count, _, height, width = shapes.pop()
    step = LABEL + height + GAP
    canvas = Image.new("RGB", (count * (width + GAP) + GAP, len(rows) * step + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (label, images) in enumerate(rows):
        draw.text((GAP, y * step + 1), label, fill="black")
        for x, pixels in enumerate(tensor_to_pixels(images.detach()).cpu()):
            canvas.paste(Image.fromarray(pixels.numpy()), (GAP + x * (width + GAP), y * step + LABEL))
    return canvas


def pixels_to_images(pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """(B, 3, H, W) uint8 -> float32 in [-1, 1] on ``device``."""
    return pixels.to(device).float() / 127.5 - 1
