"""From what is asked to a sentence, in several wordings."""

from __future__ import annotations

import numpy as np

from dcar_fast.training.shapes.asks import OPPOSITE
from dcar_fast.training.shapes.scene import Ask, Wanted

OPENINGS = ("", "", "", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "there is ")
SIZES = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
NUMBERS = {2: ("two", "two", "2"), 3: ("three", "three", "3")}
RELATIONS = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "under", "beneath"),
}
PLACES = {
    "centre": ("in the centre", "in the center", "in the middle"),
    **{
        corner: (f"in the {corner}", f"in the {corner} corner", f"at the {corner}")
        for corner in ("top left", "top right", "bottom left", "bottom right")
    },
}
BACKGROUNDS = {"grey": ("grey", "gray")}


def caption(ask: Ask, rng: np.random.Generator) -> str:
    """A sentence that asks for it; which one, rng decides."""
    opening = _one(rng, OPENINGS)
    text = _objects(ask, rng, opening)
    if ask.place:
        text += f" {_one(rng, PLACES[ask.place])}"
    if ask.background:
        colour = _one(rng, BACKGROUNDS.get(ask.background, (ask.background,)))
        text += f" on a {colour} background"
    if rng.uniform() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.uniform() < 0.2 else text


def _objects(ask: Ask, rng: np.random.Generator, opening: str) -> str:
    if opening == "there is " and ask.wanted[0].count > 1:
        opening = "there are "
    wanted = list(ask.wanted)
    if ask.relation:
        relation = ask.relation
        if rng.uniform() < 0.5:
            wanted, relation = wanted[::-1], OPPOSITE[relation]
        first, second = (_phrase(w, rng) for w in wanted)
        verb = "is " if not opening and rng.uniform() < 0.3 else ""
        return f"{opening}{first} {verb}{_one(rng, RELATIONS[relation])} {second}"
    phrases = [_phrase(wanted[i], rng) for i in rng.permutation(len(wanted))]
    if len(phrases) == 1:
        short = not opening and ask.wanted[0].count == 1 and rng.uniform() < 0.15
        return phrases[0].split(" ", 1)[1] if short else opening + phrases[0]
    joint = _one(rng, ("and", "and", "and", "next to", "with")) if len(phrases) == 2 else "and"
    return f"{opening}{', '.join(phrases[:-1])} {joint} {phrases[-1]}"


def _phrase(wanted: Wanted, rng: np.random.Generator) -> str:
    """Such as "a small red circle" or "three squares"."""
    number = _one(rng, NUMBERS[wanted.count]) if wanted.count > 1 else _one(rng, ("a", "a", "a", "one"))
    size = _one(rng, SIZES[wanted.size]) if wanted.size else None
    noun = wanted.shape + ("s" if wanted.count > 1 else "")
    return " ".join(word for word in (number, size, wanted.colour, noun) if word)


def _one(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]
