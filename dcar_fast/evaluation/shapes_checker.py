"""Says whether a picture shows what a prompt asks for, by looking at the picture alone.

The rules are GenEval's, made strict about what else is in the picture. A picture is correct if

- it has exactly as many objects as wanted, and they can be matched one to one with the wanted ones so that each has
  the shape, colour and size that were named. Any patch of saturated colour of at least a third of the smallest
  object's area is an object, whatever its shape: one too many is one too many;
- relation: the offset of the two centres is first reduced by 10 % of the sum of both boxes' sides along each axis
  (GenEval's threshold); what is left of it along the relation's axis must be more than half of the offset's length;
- place: the picture is cut at 0.405 and 0.595 of each axis, and the centre lies in the cell that was named. The middle
  is narrower than a third because a large triangle in a corner has its centre at up to 0.375;
- background: its median brightness and saturation are what the word says, generously.

Nothing here knows how the pictures of the training data are drawn.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from dcar_fast.evaluation.classification import colour_of, shape_of, size_of
from dcar_fast.evaluation.segmentation import Region, hue_of, segment
from dcar_fast.training.shapes.scene import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Ask, Wanted

WORDS = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
RELATION_THRESHOLD, RELATION_SHARE = 0.1, 0.5  # GenEval's
PLACE_BORDERS = (0.405, 0.595)
# lowest and highest value and highest saturation; in the dark, saturation says nothing
BACKGROUND_LIMITS = {
    "white": (0.88, 1.0, 0.10),
    "black": (0.0, 0.16, 1.0),
    "grey": (0.34, 0.70, 0.14),
    "light": (0.68, 1.0, 0.35),
    "dark": (0.0, 0.38, 1.0),
}


@dataclass(frozen=True)
class Found:
    """An object in a picture. x (right), y (down), width, height: in units of the picture's sides; side: of the
    square of equal area, in units of the picture's side. shape or colour None: none of those with a name.

    fits: how well each shape fits, 0..1; confidence: how far the best of them is ahead of the second.
    """

    shape: str | None
    colour: str | None
    size: str
    x: float
    y: float
    width: float
    height: float
    side: float
    hue: float
    fits: dict[str, float]

    @property
    def area(self) -> float:
        """Share of the picture."""
        return self.side**2

    @property
    def confidence(self) -> float:
        second, first = sorted(self.fits.values())[-2:]
        return first - second

    def __str__(self) -> str:
        return f"{self.size} {self.colour or 'off-colour'} {self.shape or 'blob'}"


@dataclass(frozen=True)
class Verdict:
    """correct, or else why not: ``kinds`` holds some of "count", "shape", "colour", "size", "relation", "place",
    "background", and ``reason`` says it in words."""

    correct: bool
    reason: str
    kinds: tuple[str, ...]
    found: tuple[Found, ...]


@dataclass(frozen=True)
class Look:
    """What is in a picture: its objects, the largest first, and the background's colour, RGB in 0..1."""

    found: tuple[Found, ...]
    background: tuple[float, float, float]


def look(picture: np.ndarray) -> Look:
    """picture (H, W, 3) uint8 RGB, at least 32 pixels a side; ``ValueError`` for anything else."""
    segmentation = segment(picture)
    height, width = segmentation.shape
    objects = [_describe(region, height, width) for region in segmentation.regions]
    return Look(tuple(sorted(objects, key=lambda o: -o.side)), tuple(float(v) for v in segmentation.background))


def check(picture: np.ndarray, ask: Ask) -> Verdict:
    """Whether the picture shows exactly what is asked (the module's docstring has the rules).

    ``ValueError`` for what is no (H, W, 3) uint8 picture of at least 32 pixels a side, and for an ask that cannot be
    checked, see :func:`judge`.
    """
    check_ask(ask)
    return judge(look(picture), ask)


def judge(seen: Look, ask: Ask) -> Verdict:
    """:func:`check` for a picture that was looked at already.

    ``ValueError`` for an ask with nothing or more than 7 objects wanted, an unknown word, a relation of other than two
    objects, a place of other than one.
    """
    check_ask(ask)
    problems = _match(seen.found, ask)
    if ask.background and not _is_background(seen.background, ask.background):
        levels = ", ".join(f"{round(255 * v)}" for v in seen.background)
        problems = [*problems, ("background", f"the background ({levels}) is not {ask.background}")]
    kinds = tuple(dict.fromkeys(kind for kind, _ in problems))
    return Verdict(not problems, "; ".join(text for _, text in problems), kinds, seen.found)


def _describe(region: Region, height: int, width: int) -> Found:
    shape, fits = shape_of(region)
    side = math.sqrt(region.area / (height * width))
    (x, y), (box_width, box_height), (top, left) = region.centre, region.box, region.origin
    if box_width >= width - 1 and box_height >= height - 1:
        shape = None  # from edge to edge: a saturated ground
    return Found(
        shape,
        colour_of(region.colour),
        size_of(side),
        x=(left + x) / width,
        y=(top + y) / height,
        width=box_width / width,
        height=box_height / height,
        side=side,
        hue=float(hue_of(region.colour)),
        fits=fits,
    )


Problems = list[tuple[str, str]]  # kind and text


def _match(found: tuple[Found, ...], ask: Ask) -> Problems:
    """What is wrong under the assignment of found to wanted objects with which the least is."""
    wanted = [w for w in ask.wanted for _ in range(w.count)]
    if len(found) != len(wanted):
        what = ", ".join(map(str, found)) or "nothing"
        return [("count", f"{len(found)} objects instead of {len(wanted)}: {what}")]
    assignments = (list(zip(order, wanted, strict=True)) for order in itertools.permutations(found))
    # of equally bad ones that in which objects have their shapes: "the square is not red", not "the red is no square"
    return min(
        (_problems(pairs, ask) for pairs in assignments),
        key=lambda problems: (len(problems), sum(kind == "shape" for kind, _ in problems)),
    )


def _problems(pairs: list[tuple[Found, Wanted]], ask: Ask) -> Problems:
    problems: Problems = []
    for o, w in pairs:
        for kind in ("shape", "colour", "size"):
            asked = getattr(w, kind)
            if asked is not None and getattr(o, kind) != asked:
                problems.append((kind, f"{o} is not the {_phrase(w)}"))
    if ask.relation and not _is_related(pairs[0][0], pairs[1][0], ask.relation):
        (first, _), (second, _) = pairs
        problems.append(("relation", f"the {first} is not {ask.relation} the {second}"))
    if ask.place and _place(pairs[0][0]) != ask.place:
        problems.append(("place", f"the {pairs[0][0]} is {_place(pairs[0][0])}, not {ask.place}"))
    return problems


def _is_related(first: Found, second: Found, relation: str) -> bool:
    offset = np.array([first.x - second.x, first.y - second.y])
    sides = np.array([first.width + second.width, first.height + second.height])
    rest = np.sign(offset) * np.maximum(np.abs(offset) - RELATION_THRESHOLD * sides, 0)
    right, down = rest / max(np.linalg.norm(offset), 1e-9)
    share = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
    return bool(share > RELATION_SHARE)


def _place(o: Found) -> str:
    """Such as "top left", "top" or "centre"."""
    column = ("left", "", "right")[int(np.searchsorted(PLACE_BORDERS, o.x))]
    row = ("top", "", "bottom")[int(np.searchsorted(PLACE_BORDERS, o.y))]
    return f"{row} {column}".strip() or "centre"


def _is_background(colour: tuple[float, float, float], name: str) -> bool:
    low, high, most_saturated = BACKGROUND_LIMITS[name]
    value, chroma = max(colour), max(colour) - min(colour)
    return low <= value <= high and chroma <= most_saturated * max(value, 1e-9)


def _phrase(wanted: Wanted) -> str:
    return " ".join(word for word in (wanted.size, wanted.colour, wanted.shape or "object") if word)


def check_ask(ask: Ask) -> None:
    """``ValueError`` for an ask that cannot be checked, see :func:`judge`."""
    if not isinstance(ask, Ask):
        raise ValueError(f"ask must be an Ask, got {type(ask).__name__}")
    total = sum(w.count for w in ask.wanted)
    if not ask.wanted or min(w.count for w in ask.wanted) < 1 or total > 7:
        raise ValueError(f"ask.wanted must ask for 1 to 7 objects, got {ask.wanted}")
    words = [(kind, getattr(w, kind), names) for w in ask.wanted for kind, names in WORDS.items()]
    for name, value, allowed in (
        *words,
        ("relation", ask.relation, RELATIONS),
        ("place", ask.place, PLACES),
        ("background", ask.background, BACKGROUNDS),
    ):
        if value is not None and value not in allowed:
            raise ValueError(f"ask.{name} must be None or one of {allowed}, got {value!r}")
    if ask.relation and total != 2:
        raise ValueError(f"ask.relation is between two objects, but {total} are wanted")
    if ask.place and total != 1:
        raise ValueError(f"ask.place is that of one object, but {total} are wanted")
