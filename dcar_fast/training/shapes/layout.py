"""From what is asked to a scene that shows it: everything left open is drawn at random."""

from __future__ import annotations

import math

import numpy as np

from dcar_fast.training.shapes.scene import COLOURS, PLACES, SHAPES, SIZES, Ask, Background, Object, Scene
from dcar_fast.training.shapes.variety import EIGHTHS, VARIETIES, Variety

HUES = (-0.005, 0.005)  # about that of the colour's name
SATURATION, VALUE = (0.96, 1.0), (0.95, 1.0)
TINTED = 0.18  # saturation of backgrounds that are not grey
EDGE = 0.02  # free space around every object, in units of the picture's side
APART = 0.04  # between the circles around two objects
OFFSET = 0.25  # least distance of two centres along the axis of a relation
SLOPE = 0.6  # their distance across that axis, at most this share of the one along it
# a centre in a corner or in the middle lies in this range of both axes (mirrored for right and bottom)
CORNER, MIDDLE = (0.0, 0.34), (0.42, 0.58)

# Distance from the centre to the farthest point, over the side of the square of equal area.
REACH = {"circle": 1 / math.sqrt(math.pi), "square": math.sqrt(0.5), "triangle": 2 / 27**0.25}


def draw_scene(ask: Ask, rng: np.random.Generator, variety: str = "full") -> Scene:
    """A random scene that shows exactly what is asked; variety: of what is left open, one of ``VARIETIES``."""
    v = VARIETIES[variety]
    kinds = [(w, _pick(rng, SHAPES, w.shape)) for w in ask.wanted for _ in range(w.count)]
    while True:
        objects = _place([_object(rng, wanted, shape, len(kinds), v) for wanted, shape in kinds], ask, rng, v)
        if objects is not None:
            return Scene(_background(ask.background, rng, v), tuple(objects))


def _object(rng: np.random.Generator, wanted, shape: str, among: int, v: Variety) -> Object:
    """An object at no place yet; among several, large ones are rarer, because they would not fit."""
    size = wanted.size or "medium"
    if not wanted.size and v.sizes == "any":
        size = str(rng.choice(list(SIZES), p=(0.3, 0.4, 0.3) if among < 3 else (0.5, 0.45, 0.05)))
    colour = _pick(rng, tuple(COLOURS), wanted.colour)
    return Object(
        shape,
        colour,
        size=_within(SIZES[size], rng, v),
        x=0.0,
        y=0.0,
        hue=(COLOURS[colour] + _within(HUES, rng, v)) % 1,
        saturation=_within(SATURATION, rng, v),
        value=_within(VALUE, rng, v),
        angle=0.0,
    )


def _within(limits: tuple[float, float], rng: np.random.Generator, v: Variety) -> float:
    """A random number between the two, drawn together towards their middle as ``v.spread`` says."""
    drawn, middle = float(rng.uniform(*limits)), sum(limits) / 2
    return drawn if v.spread == 1 else middle + v.spread * (drawn - middle)


def _place(objects: list[Object], ask: Ask, rng: np.random.Generator, v: Variety) -> list[Object] | None:
    """The objects at random places that do not overlap and keep relation and place; None if none was found."""
    for _ in range(100):
        placed = [_somewhere(o, ask.place, rng, v) for o in objects]
        if all(_apart(a, b) for i, a in enumerate(placed) for b in placed[:i]) and _related(placed, ask.relation):
            return placed
    return None


def _somewhere(o: Object, place: str | None, rng: np.random.Generator, v: Variety) -> Object:
    """The object at a random point of the place, or of any."""
    if place is None and v.places == "named":
        place = PLACES[int(rng.integers(len(PLACES)))]
    return _at(o, *(_on_lattice(*_range(o, place, axis), rng, v.lattice) for axis in (0, 1)))


def _range(o: Object, place: str | None, axis: int) -> tuple[float, float]:
    """Where the centre may lie along x (axis 0) or y."""
    least = o.size * REACH[o.shape] + EDGE
    if place == "centre":
        return MIDDLE
    if place is not None:
        corner = (least, max(least, CORNER[1]))
        return corner if place.split()[1 - axis] in ("left", "top") else (1 - corner[1], 1 - corner[0])
    return least, 1 - least


def _on_lattice(low: float, high: float, rng: np.random.Generator, lattice: int) -> float:
    """A random multiple of 1 / lattice, moved to the next eighth between the two, or to the next one towards the middle
    where there is none."""
    first, last = math.ceil(low * EIGHTHS), math.floor(high * EIGHTHS)
    if first > last:
        return (first if low < 0.5 else last) / EIGHTHS
    places = sorted({min(max(i * EIGHTHS // lattice, first), last) for i in range(1, lattice)})
    return places[rng.integers(len(places))] / EIGHTHS


def _at(o: Object, x: float, y: float) -> Object:
    return Object(o.shape, o.colour, o.size, float(x), float(y), o.hue, o.saturation, o.value, o.angle)


def _apart(a: Object, b: Object) -> bool:
    distance = math.hypot(a.x - b.x, a.y - b.y)
    return distance >= a.size * REACH[a.shape] + b.size * REACH[b.shape] + APART


def _related(objects: list[Object], relation: str | None) -> bool:
    if relation is None:
        return True
    first, second = objects
    right, down = first.x - second.x, first.y - second.y
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    along = -along if relation in ("left of", "above") else along
    return along >= OFFSET and abs(across) <= SLOPE * along


def _background(name: str | None, rng: np.random.Generator, v: Variety) -> Background:
    """A tone of few, grey or with a slight tint, plain or with a soft texture."""
    tones = {
        None: v.tones,
        "white": v.tones[-1:],
        "black": v.tones[:1],
        "grey": (v.tones[len(v.tones) // 2],),
        "light": v.tones[-2:],
        "dark": v.tones[:2],
    }[name]
    tinted = name not in ("white", "black", "grey") and rng.uniform() < v.tinted
    texture = "plain"
    if name not in ("white", "black"):
        shares = (1 - v.textured, v.textured / 2, v.textured / 2)
        texture = str(rng.choice(["plain", "gradient", "waves"], p=shares))
    return Background(
        hue=int(rng.integers(v.tints)) / v.tints,
        saturation=TINTED if tinted else 0.0,
        value=_choice(rng, tones),
        texture=texture,
        direction=int(rng.integers(8)) * math.pi / 4,
        amplitude=0.08 if texture != "plain" else 0.0,
        wavelength=float(rng.uniform(0.5, 1.0)),
        phase=float(rng.uniform(0, 2 * math.pi)),
    )


def _choice(rng: np.random.Generator, values: tuple[float, ...]) -> float:
    return values[int(rng.integers(len(values)))]


def _pick(rng: np.random.Generator, values: tuple[str, ...], given: str | None) -> str:
    return values[int(rng.integers(len(values)))] if given is None else given
