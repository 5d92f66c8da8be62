"""From a scene to pixels, in plain numpy: signed distances give each pixel the share that an edge covers."""

from __future__ import annotations

import colorsys
import math

import numpy as np

from dcar_fast.training.shapes.scene import Background, Object, Scene

MIN_SIZE, MAX_SIZE = 16, 4096


def render(scene: Scene, size: int) -> np.ndarray:
    """The scene as (size, size, 3) uint8 RGB, smooth at edges. ``ValueError`` for a size out of 16..4096."""
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size must be an integer in {MIN_SIZE}..{MAX_SIZE} pixels, got {size!r}")
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = centres[None, :], centres[:, None]
    picture = _background(scene.background, x, y)
    for o in scene.objects:
        cover = np.clip(0.5 - _distance(o, x - o.x, y - o.y) * size, 0, 1)[..., None]  # (size, size, 1)
        colour = np.array(colorsys.hsv_to_rgb(o.hue, o.saturation, o.value), dtype=np.float32)
        picture = picture * (1 - cover) + colour * cover
    return np.rint(picture * 255).astype(np.uint8)


def _background(b: Background, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    colour = np.array(colorsys.hsv_to_rgb(b.hue, b.saturation, b.value), dtype=np.float32)
    along = (x - 0.5) * math.cos(b.direction) + (y - 0.5) * math.sin(b.direction)  # -0.71 .. 0.71
    if b.texture == "waves":
        along = 0.7 * np.sin(2 * math.pi * along / b.wavelength + b.phase)
    light = 1 + b.amplitude * along / 0.7 if b.texture != "plain" else np.ones_like(along)
    return np.clip(light[..., None] * colour, 0, 1).astype(np.float32)


def _distance(o: Object, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline, negative inside; of a polygon, that to the lines of its sides."""
    if o.shape == "circle":
        return np.sqrt(x * x + y * y) - o.size / math.sqrt(math.pi)
    # directions of the sides' normals and their distance from the centre
    if o.shape == "square":
        normals, inner = [k * math.pi / 2 for k in range(4)], o.size / 2
    else:  # an equilateral triangle of area size^2, one side at the bottom
        normals, inner = [math.pi / 2 + k * 2 * math.pi / 3 for k in range(3)], o.size / 27**0.25
    sides = [x * math.cos(a + o.angle) + y * math.sin(a + o.angle) for a in normals]
    return np.maximum.reduce([np.broadcast_to(s, np.broadcast_shapes(x.shape, y.shape)) for s in sides]) - inner
