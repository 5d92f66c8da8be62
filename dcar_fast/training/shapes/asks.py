"""What prompts ask for: drawn at random by category, and divided into a training and a held-out part."""

from __future__ import annotations

import hashlib

import numpy as np

from dcar_fast.training.shapes.scene import BACKGROUNDS, CATEGORIES, COLOURS, PLACES, RELATIONS, SHAPES, Ask, Wanted

HELD_OUT = 5  # one combination in so many
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIZE_WORDS = ("small", "large")  # "medium" is what is left unsaid
COLOUR_NAMES = tuple(COLOURS)


def draw_ask(rng: np.random.Generator, category: str | None = None, held_out: bool = False) -> Ask:
    """A random ask of the category (None: any) from the training part, or from the held-out one."""
    if category is None:
        category = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
    while True:
        ask = _BY_CATEGORY[category](rng)
        if is_held_out(ask) == held_out:
            return ask


def combination(ask: Ask) -> str:
    """What is asked, in one way of saying it: order, wording and background make no difference."""
    wanted, relation = list(ask.wanted), ask.relation
    if relation in ("right of", "below"):
        wanted, relation = wanted[::-1], OPPOSITE[relation]
    if relation is None:
        wanted.sort(key=repr)
    kinds = [f"{w.count} {w.size} {w.colour} {w.shape}" for w in wanted]
    return f"{', '.join(kinds)}; {relation}; {ask.place}"


def is_held_out(ask: Ask) -> bool:
    """Whether the combination belongs to the fifth that no training prompt asks for."""
    digest = hashlib.sha256(combination(ask).encode()).digest()
    return digest[0] % HELD_OUT == 0


def _single(rng: np.random.Generator) -> Ask:
    size, place = _maybe(rng, SIZE_WORDS, 0.4), _maybe(rng, PLACES, 0.4)
    return Ask("single object", (Wanted(_one(rng, SHAPES), size=size),), place=place, background=_backdrop(rng))


def _colours(rng: np.random.Generator) -> Ask:
    size, place = _maybe(rng, SIZE_WORDS, 0.4), _maybe(rng, PLACES, 0.4)
    wanted = Wanted(_one(rng, SHAPES), _one(rng, COLOUR_NAMES), size)
    return Ask("colours", (wanted,), place=place, background=_backdrop(rng))


def _two(rng: np.random.Generator) -> Ask:
    """Two shapes that differ, at most one of them with a colour."""
    first, second = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    sizes = (_maybe(rng, SIZE_WORDS, 0.3), _maybe(rng, ("small",), 0.15))  # two large ones have no room
    wanted = (Wanted(first, _maybe(rng, COLOUR_NAMES, 0.3), sizes[0]), Wanted(second, None, sizes[1]))
    return Ask("two objects", wanted, background=_backdrop(rng))


def _counting(rng: np.random.Generator) -> Ask:
    count = int(rng.choice([1, 2, 3], p=(0.1, 0.45, 0.45)))
    size = _maybe(rng, SIZE_WORDS if count == 1 else ("small",), 0.25)
    wanted = Wanted(_one(rng, SHAPES), _maybe(rng, COLOUR_NAMES, 0.6), size, count)
    return Ask("counting", (wanted,), background=_backdrop(rng))


def _position(rng: np.random.Generator) -> Ask:
    wanted = _different(rng, 2, coloured=0.6)
    return Ask("position", wanted, relation=_one(rng, RELATIONS), background=_backdrop(rng))


def _binding(rng: np.random.Generator) -> Ask:
    wanted = _different(rng, 2 if rng.uniform() < 0.75 else 3, coloured=1.0)
    return Ask("attribute binding", wanted, background=_backdrop(rng))


def _different(rng: np.random.Generator, count: int, coloured: float) -> tuple[Wanted, ...]:
    """Objects that cannot be taken for each other: all with different colours, or (uncoloured) different shapes."""
    if rng.uniform() < coloured:
        colours = [COLOUR_NAMES[i] for i in rng.permutation(len(COLOUR_NAMES))[:count]]
        return tuple(Wanted(_one(rng, SHAPES), colour) for colour in colours)
    return tuple(Wanted(SHAPES[i]) for i in rng.permutation(len(SHAPES))[:count])


_BY_CATEGORY = dict(zip(CATEGORIES, (_single, _two, _counting, _colours, _position, _binding), strict=True))


def _one(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _maybe(rng: np.random.Generator, values: tuple[str, ...], probability: float) -> str | None:
    return _one(rng, values) if rng.uniform() < probability else None


def _backdrop(rng: np.random.Generator) -> str | None:
    return _maybe(rng, BACKGROUNDS, 0.15)
