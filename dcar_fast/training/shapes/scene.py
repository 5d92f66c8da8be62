"""What a picture of the ``shapes`` data shows, and what a prompt asks of one."""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": 0.0, "green": 0.33, "blue": 0.62, "yellow": 0.15}
"""Colour names and their hues in 0..1; pictures vary by +-0.05 at most."""
SIZES = {"small": (0.165, 0.17), "medium": (0.22, 0.23), "large": (0.365, 0.38)}
"""Size names and their ranges, in units of the picture's side: the side of the square of equal area."""
RELATIONS = ("left of", "right of", "above", "below")
PLACES = ("top left", "top right", "bottom left", "bottom right", "centre")
BACKGROUNDS = ("white", "black", "grey", "light", "dark")
CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "attribute binding")
"""GenEval's six."""


@dataclass(frozen=True)
class Object:
    """A shape in a picture: centre x (right), y (down) and size in units of the picture's side; hue, saturation and
    value in 0..1; angle in radians. size is the side of the square of equal area."""

    shape: str
    colour: str
    size: float
    x: float
    y: float
    hue: float
    saturation: float
    value: float
    angle: float


@dataclass(frozen=True)
class Background:
    """A colour of low saturation; texture "plain", "gradient" or "waves" brightens and darkens it softly.

    direction in radians, amplitude as a share of the value, wavelength in units of the picture's side, phase in
    radians.
    """

    hue: float
    saturation: float
    value: float
    texture: str = "plain"
    direction: float = 0.0
    amplitude: float = 0.0
    wavelength: float = 1.0
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows."""

    background: Background
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Wanted:
    """``count`` objects of a kind; None leaves a property open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Ask:
    """What a prompt asks for: exactly these objects and no others.

    relation: where the first of two wanted objects is, seen from the second; place: where a single object is;
    background: one of BACKGROUNDS.
    """

    category: str
    wanted: tuple[Wanted, ...]
    relation: str | None = None
    place: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt's text and what it asks for."""

    text: str
    ask: Ask
