"""Draws shapes with PIL, four times as large and then reduced: independent of the data set's renderer."""

from __future__ import annotations

import colorsys
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SCALE = 4
HUES = {"red": 0.0, "green": 0.33, "blue": 0.62, "yellow": 0.15}
SIDES = {"small": (0.15, 0.19), "medium": (0.22, 0.27), "large": (0.32, 0.42)}
# circumscribed radius over the side of the square of equal area
RADIUS = {"circle": 1 / math.sqrt(math.pi), "square": math.sqrt(0.5), "triangle": 2 / 27**0.25}


@dataclass(frozen=True)
class Thing:
    """x, y: the centre, side: of the square of equal area, both in units of the picture; angle in degrees."""

    shape: str
    colour: tuple[int, int, int]
    x: float
    y: float
    side: float
    angle: float = 0.0


def rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def plain(size: int, colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def textured(size: int, rng: np.random.Generator) -> Image.Image:
    """A soft texture: an enlarged random grid around an unsaturated colour."""
    base = np.array(rgb(rng.uniform(), rng.uniform(0, 0.25), rng.uniform(0.05, 1.0)), dtype=float)
    grid = base * (1 + rng.uniform(-0.15, 0.15, (5, 5, 1)))
    return Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)


def draw(background: Image.Image, things: list[Thing]) -> np.ndarray:
    """(size, size, 3) uint8."""
    size = background.width
    big = background.resize((size * SCALE, size * SCALE), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(big)
    for thing in things:
        radius = thing.side * RADIUS[thing.shape] * size * SCALE
        x, y = thing.x * size * SCALE, thing.y * size * SCALE
        if thing.shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius - 1, y + radius - 1), fill=thing.colour)  # inclusive
            continue
        start, sides = (45, 4) if thing.shape == "square" else (-90, 3)
        angles = [math.radians(start + thing.angle + k * 360 / sides) for k in range(sides)]
        canvas.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=thing.colour)
    return np.array(big.resize((size, size), Image.Resampling.BOX))


def random_things(rng: np.random.Generator) -> tuple[list[tuple[str, str, str]], list[Thing]]:
    """One to three things that do not touch, and the (shape, colour, size) of each."""
    while True:
        kinds, things = [], []
        for _ in range(rng.integers(1, 4)):
            shape, colour, size = (str(rng.choice(list(names))) for names in (RADIUS, HUES, SIDES))
            side = rng.uniform(*SIDES[size])
            reach = side * RADIUS[shape]
            x, y = rng.uniform(reach, 1 - reach, 2)
            shade = rgb(HUES[colour] + rng.uniform(-0.05, 0.05), rng.uniform(0.6, 1), rng.uniform(0.55, 1))
            kinds.append((shape, colour, size))
            things.append(Thing(shape, shade, x, y, side, rng.uniform(-10, 10)))
        gaps = [
            math.hypot(a.x - b.x, a.y - b.y) - (a.side * RADIUS[a.shape] + b.side * RADIUS[b.shape])
            for i, a in enumerate(things)
            for b in things[:i]
        ]
        if min(gaps, default=1) > 0.03:
            return kinds, things


def degraded(picture: np.ndarray, how: str, rng: np.random.Generator) -> np.ndarray:
    image = Image.fromarray(picture)
    if how == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=60)
        return np.asarray(Image.open(buffer).convert("RGB"))
    if how == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)))
    if how == "noise":
        return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).round().astype(np.uint8)
    assert how == "none"
    return picture
