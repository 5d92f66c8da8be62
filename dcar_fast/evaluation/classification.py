"""Names an object's shape, colour and size.

Shape: ideal circles, squares and equilateral triangles of the object's area are laid on its centre of gravity, turned
in steps of 5 degrees, with sharp to soft edges; the best fit (shared over united area) names it. Ideal shapes of equal
area fit each other by 0.83 (circle and square), 0.69 (circle and triangle) and 0.68 (square and triangle, best angle).
What fits none of them by LEAST_FIT has no name.
"""

from __future__ import annotations

import math

import numpy as np

from dcar_fast.evaluation.segmentation import Region, hue_distance, hue_of
from dcar_fast.training.shapes.scene import COLOURS

LEAST_FIT = 0.75
EDGES = (1.0, 2.0, 3.5)  # widths of the templates' edges in pixels: anti-aliased, and twice blurred
STEP = math.radians(5)
SIDES = {"square": 4, "triangle": 3}
# half of the smallest distance between two names' hues (red and yellow)
MOST_HUE_DISTANCE = 0.075
SIZE_BORDERS = (0.205, 0.3)  # between small and medium, medium and large, of the picture's side


def shape_of(region: Region) -> tuple[str | None, dict[str, float]]:
    """The shape's name, None if no shape fits, and how well each one fits, 0..1."""
    fits = {shape: _fit(region.cover, distances) for shape, distances in _templates(region).items()}
    best = max(fits, key=fits.__getitem__)
    return (best if fits[best] >= LEAST_FIT else None), fits


def colour_of(colour: np.ndarray) -> str | None:
    """The name whose hue is nearest to that of an RGB colour, None if none is near."""
    distances = {name: float(hue_distance(hue_of(colour), hue)) for name, hue in COLOURS.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= MOST_HUE_DISTANCE else None


def size_of(side: float) -> str:
    """side: of the square of equal area, in units of the picture's side."""
    return ("small", "medium", "large")[int(np.searchsorted(SIZE_BORDERS, side))]


def _templates(region: Region) -> dict[str, np.ndarray]:
    """Signed distances (angles, h, w) in pixels to the outlines of shapes of the region's area, negative inside."""
    cx, cy = region.centre
    y, x = (np.arange(n) + 0.5 for n in region.cover.shape)
    x, y = x[None, :] - cx, y[:, None] - cy
    distances = {"circle": (np.hypot(x, y) - math.sqrt(region.area / math.pi))[None]}
    for shape, sides in SIDES.items():
        turn = 2 * math.pi / sides
        # a regular polygon of n sides at distance r from its centre has the area n r^2 tan(pi / n)
        inner = math.sqrt(region.area / (sides * math.tan(math.pi / sides)))
        normals = np.arange(0, turn - 1e-9, STEP)[:, None] + turn * np.arange(sides)  # (angles, sides)
        reach = np.cos(normals)[..., None, None] * x + np.sin(normals)[..., None, None] * y
        distances[shape] = reach.max(axis=1) - inner
    return distances


def _fit(cover: np.ndarray, distances: np.ndarray) -> float:
    best = 0.0
    for width in EDGES:
        ideal = np.clip(0.5 - distances / width, 0, 1)
        shared = float(np.minimum(ideal, cover).sum(axis=(1, 2)).max())
        # both have the same area, part of the ideal shape's may lie outside of the crop
        best = max(best, shared / (2 * cover.sum() - shared))
    return best
