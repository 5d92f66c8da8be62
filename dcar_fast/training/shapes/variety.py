"""How much varies in the pictures that captions do not speak of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EIGHTHS = 8  # centres lie on multiples of the picture's side over so much: corners of 8 px patches at 64 px


@dataclass(frozen=True)
class Variety:
    """lattice: centres lie on multiples of the side over so much. places: any of them, or the five that captions name
    (the corners and the centre). sizes: objects of which nothing is said have any size, or the medium one. spread: of
    hue, saturation, value and size within what a name allows, 1 or 0. tones: values of backgrounds, ascending; tints:
    hues of those that are not grey, and tinted, how many are not; textured: how many are brightened and darkened
    softly."""

    lattice: int
    places: Literal["any", "named"]
    sizes: Literal["any", "medium"]
    spread: float
    tones: tuple[float, ...]
    tints: int = 1
    tinted: float = 0.0
    textured: float = 0.0


VARIETIES = {
    "full": Variety(
        EIGHTHS, "any", "any", 1.0, (0.06, 0.2, 0.35, 0.5, 0.65, 0.8, 0.97), tints=6, tinted=0.5, textured=0.24
    ),
    "few": Variety(4, "named", "medium", 0.0, (0.06, 0.2, 0.5, 0.8, 0.97)),
}
"""By the name that ``data.variety`` has. With "few" a small model learns much sooner what captions say."""
