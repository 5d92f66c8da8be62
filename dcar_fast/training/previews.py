"""Pictures for the training log: a grid of samples with their prompts beneath."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SMALLEST_CELL = 128  # pixels: smaller pictures are enlarged, so that the prompts can be read
MARGIN = 6  # pixels around a picture
FONT_SIZE = 12
LINES = 4  # of a prompt, the rest is cut off


def prompt_grid(images: Sequence[Image.Image], prompts: Sequence[str], columns: int | None = None) -> Image.Image:
    """One RGB picture of all images, row by row, each with its prompt beneath.

    columns: by default about as many as there are rows. Small images are enlarged by a whole factor, pixel by pixel.
    ``ValueError`` for no images or another number of prompts.
    """
    if not images or len(images) != len(prompts):
        raise ValueError(f"images: at least one and as many as prompts, got {len(images)} and {len(prompts)} prompts")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be positive, got {columns}")
    columns = min(columns, len(images))
    side = max(max(image.size) for image in images)
    factor = max(1, -(-SMALLEST_CELL // side))
    font = ImageFont.load_default(FONT_SIZE)
    width, line = side * factor + 2 * MARGIN, FONT_SIZE + 4
    height = width + LINES * line
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % columns * width + MARGIN, i // columns * height + MARGIN
        enlarged = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        grid.paste(enlarged, (x, y))
        text = "\n".join(wrapped(prompt, font, side * factor)[:LINES])
        draw.multiline_text((x, y + side * factor + 2), text, fill="black", font=font, spacing=2)
    return grid


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The words of ``text`` in lines of at most ``width`` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
