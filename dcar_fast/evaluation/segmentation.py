"""Cuts a picture into saturated objects and an unsaturated background, to a fraction of a pixel.

Pixels are first told apart by saturation: objects have 0.55 and more, backgrounds less than 0.3. That puts an
anti-aliased outline too far out on a black ground and too far in on a white one. So every object's colour and the
colour around it are measured, and a pixel on the outline counts with the share of it that the object covers: the
pixel's colour projected on the line between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dcar_fast.evaluation._components import grow, label, shrink
from dcar_fast.training.shapes.scene import COLOURS, SIZES

SATURATION = 0.42  # between the 0.3 of backgrounds and the 0.55 of objects
CHROMA = 0.16  # largest minus smallest channel: in the dark, noise alone gives any saturation
LEAST_AREA = 0.3 * SIZES["small"][0] ** 2  # share of the picture: below a third of the smallest object it is a speckle
WORKING_SIDE = 128  # larger pictures are averaged over blocks first: to 64 .. 127 pixels
OUTLINE = 2  # pixels around the saturated ones that may belong to the outline
SECOND_COLOUR = 0.25  # from this share of its pixels on, another colour in a patch is another object
HUES = np.array(list(COLOURS.values()))


@dataclass(frozen=True)
class Region:
    """One object. cover (h, w) float64: the share of each pixel that it covers, in a crop whose upper left pixel is
    ``origin`` (row, column); colour (3,) RGB in 0..1."""

    cover: np.ndarray
    origin: tuple[int, int]
    colour: np.ndarray

    @property
    def area(self) -> float:
        """In pixels of the working picture."""
        return float(self.cover.sum())

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels of the crop; the middle of its first pixel is at 0.5."""
        y, x = (np.arange(n) + 0.5 for n in self.cover.shape)
        return float(self.cover.sum(0) @ x / self.area), float(self.cover.sum(1) @ y / self.area)

    @property
    def box(self) -> tuple[float, float]:
        """(width, height) of what is at least half covered, in pixels."""
        half = self.cover >= 0.5
        return tuple(float(np.ptp(np.flatnonzero(half.any(axis))) + 1) if half.any() else 0.0 for axis in (0, 1))


@dataclass(frozen=True)
class Segmentation:
    """The objects, the background's median colour (3,) RGB in 0..1, and (height, width) of the working picture."""

    regions: list[Region]
    background: np.ndarray
    shape: tuple[int, int]


def segment(picture: np.ndarray) -> Segmentation:
    """picture (H, W, 3) uint8 RGB, sides of 32 pixels and more. ``ValueError`` for anything else."""
    pixels = _working_picture(_checked(picture))
    saturated = _saturated(pixels)
    patches = _patches(pixels, saturated)
    covered = grow(saturated, OUTLINE)
    free = ~covered if (~covered).any() else ~saturated
    background = np.median(pixels[free], axis=0) if free.any() else np.median(pixels.reshape(-1, 3), axis=0)
    regions = [_region(pixels, patches, i, free, background) for i in range(len(patches))]
    return Segmentation(regions, background, pixels.shape[:2])


def hue_of(colours: np.ndarray) -> np.ndarray:
    """RGB (..., 3) in 0..1 -> hue in 0..1, 0 for grey."""
    r, g, b = np.moveaxis(colours, -1, 0)
    high, chroma = colours.max(-1), np.ptp(colours, axis=-1)
    safe = np.where(chroma > 0, chroma, 1)
    sector = np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    return np.where(chroma > 0, sector / 6 % 1, 0.0)


def hue_distance(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """Around the circle: 0 .. 0.5."""
    return np.abs((np.asarray(a) - b + 0.5) % 1 - 0.5)


def _checked(picture: np.ndarray) -> np.ndarray:
    ok = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    if not ok:
        got = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise ValueError(f"picture must be a (H, W, 3) uint8 array, got {got}")
    if min(picture.shape[:2]) < 32:
        raise ValueError(f"picture must have sides of at least 32 pixels, got {picture.shape[1]} x {picture.shape[0]}")
    return picture


def _working_picture(picture: np.ndarray) -> np.ndarray:
    """Float RGB in 0..1 (h, w, 3); large pictures averaged over square blocks, what is left at the edges cut off."""
    step = max(1, min(picture.shape[:2]) // (WORKING_SIDE // 2))
    height, width = (side // step for side in picture.shape[:2])
    blocks = picture[: height * step, : width * step].reshape(height, step, width, step, 3)
    return blocks.mean(axis=(1, 3)) / 255


def _saturated(pixels: np.ndarray) -> np.ndarray:
    high, chroma = pixels.max(-1), np.ptp(pixels, axis=-1)
    return (chroma >= CHROMA) & (chroma >= SATURATION * high)


def _patches(pixels: np.ndarray, saturated: np.ndarray) -> list[np.ndarray]:
    """A mask (h, w) for every connected patch of saturated pixels that is large enough, split where it has two
    colours."""
    nearest = hue_distance(hue_of(pixels)[..., None], HUES).argmin(-1)
    least = LEAST_AREA * saturated.size
    found = []
    for patch in _large(saturated, least):
        counts = np.bincount(nearest[patch], minlength=len(HUES))
        strong = np.flatnonzero(counts >= max(least, SECOND_COLOUR * patch.sum()))
        hues = [_median_hue(pixels[patch & (nearest == k)]) for k in strong]
        # a colour between two names is one colour, on whichever side of the border its pixels happen to lie
        several = any(hue_distance(a, b) > 0.1 for i, a in enumerate(hues) for b in hues[:i])
        parts = [part for k in strong for part in _large(patch & (nearest == k), least)] if several else [patch]
        found += parts
    return found


def _median_hue(colours: np.ndarray) -> float:
    return float(hue_of(np.median(colours, axis=0)))


def _large(mask: np.ndarray, least: float) -> list[np.ndarray]:
    labels, count = label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == i for i in range(1, count + 1) if sizes[i] >= least]


def _region(pixels, patches: list[np.ndarray], index: int, free, background) -> Region:
    patch = patches[index]
    inside = next(mask for mask in (shrink(patch, 2), shrink(patch, 1), patch) if mask.sum() >= 8 or mask is patch)
    colour = np.median(pixels[inside], axis=0)
    around = grow(patch, OUTLINE + 4) & free
    ground = np.median(pixels[around], axis=0) if around.sum() >= 8 else background
    others = np.zeros_like(patch)
    for i, other in enumerate(patches):
        if i != index:
            others |= grow(other, 1)
    outline = grow(patch, OUTLINE) & ~(others & ~patch)
    rows, columns = (np.flatnonzero(outline.any(axis)) for axis in (1, 0))
    crop = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    line = colour - ground
    length = line @ line
    if length < 1e-4:  # nothing around it to tell it from: the whole picture is of one colour
        cover = patch[crop].astype(np.float64)
    else:
        cover = np.where(outline[crop], np.clip((pixels[crop] - ground) @ line / length, 0, 1), 0.0)
    return Region(cover, (int(rows[0]), int(columns[0])), colour)
