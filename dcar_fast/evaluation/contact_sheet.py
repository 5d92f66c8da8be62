"""A sheet of pictures with their prompts and what is wrong with them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

THUMBNAIL, WIDTH, GAP, LINE = 128, 216, 12, 13  # pixels
CHARACTERS, LINES = 34, 8  # of text below a picture
COLUMNS = 6


def contact_sheet(entries: Sequence[tuple[np.ndarray, str, str]]) -> Image.Image:
    """entries: picture (H, W, 3) uint8, its prompt, and the reason, which is set in red. ``ValueError`` for none."""
    if not entries:
        raise ValueError("entries must hold at least one picture, got none")
    columns = min(COLUMNS, len(entries))
    rows = -(-len(entries) // columns)
    height = THUMBNAIL + LINES * LINE + GAP
    sheet = Image.new("RGB", (columns * WIDTH + GAP, rows * height + GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (picture, prompt, reason) in enumerate(entries):
        x, y = GAP + i % columns * WIDTH, GAP + i // columns * height
        image = Image.fromarray(picture)
        # whole pixels, so that what was judged is what is seen
        scale = max(1, THUMBNAIL // max(image.size))
        shown = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        shown.thumbnail((THUMBNAIL, THUMBNAIL))
        sheet.paste(shown, (x, y))
        lines = [(line, "black") for line in textwrap.wrap(prompt, CHARACTERS)]
        lines += [(line, "#b00000") for line in textwrap.wrap(reason, CHARACTERS)]
        for j, (line, colour) in enumerate(lines[:LINES]):
            text = line.encode("latin-1", "replace").decode("latin-1")  # all that Pillow's own font can draw
            canvas.text((x, y + THUMBNAIL + 2 + j * LINE), text, fill=colour, font=font)
    return sheet
