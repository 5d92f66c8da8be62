"""How far the checker of ShapesEval can be trusted: on true pictures, on wrong ones, and on spoilt ones.

This is the one file of the evaluation that calls the renderer of the data; the checker does not.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from dcar_fast.evaluation.shapes_checker import check_ask, judge, look
from dcar_fast.evaluation.shapes_eval import Score, ShapesReport, judge_pictures
from dcar_fast.training.shapes import Prompt, Wanted, held_out_prompts, render_prompt
from dcar_fast.training.shapes.scene import CATEGORIES, COLOURS, SHAPES, SIZES, Ask

SHUFFLES = 10  # every picture is judged by so many other prompts
KNOWN = 4  # pictures of every shape, colour and size in the tables of confusions
NOTHING, NAMELESS = "nothing or several", "no name"


@dataclass(frozen=True)
class Validation:
    """true: the renders of the prompts, judged by their own ones. shuffled: the same pictures by other prompts, which
    some of them happen to show (any picture of a circle is one of "a circle"): the level of chance, by category of the
    prompt.

    spoilt: by how it was spoilt, the scores of single objects of known kind, where shape, colour and size must be
    right. confusions: by how it was spoilt and by property, how often what was drawn was taken for what.
    """

    true: ShapesReport
    shuffled: dict[str, Score]
    spoilt: dict[str, Score]
    confusions: dict[str, dict[str, dict[str, dict[str, int]]]]

    @property
    def chance(self) -> Score:
        scores = self.shuffled.values()
        return Score(sum(s.correct for s in scores), sum(s.total for s in scores))

    def to_dict(self) -> dict[str, Any]:
        return {
            "true": self.true.to_dict(),
            "shuffled": {"overall": self.chance.to_dict(), **{k: s.to_dict() for k, s in self.shuffled.items()}},
            "spoilt": {how: score.to_dict() for how, score in self.spoilt.items()},
            "confusions": self.confusions,
        }

    def table(self) -> str:
        lines = ["true renders", self.true.table(), "", "shuffled prompts (the level of chance)"]
        for name, score in [*self.shuffled.items(), ("overall", self.chance)]:
            lines.append(f"{name:<18}{score.correct:>9}{score.total:>6}{100 * score.rate:>8.2f}%")
        lines += ["", "single objects of known shape, colour and size"]
        for how, score in self.spoilt.items():
            lines.append(f"{how:<18}{score.correct:>9}{score.total:>6}{100 * score.rate:>8.1f}%")
            for kind, table in self.confusions[how].items():
                for drawn, counts in table.items():
                    wrong = {found: n for found, n in counts.items() if found != drawn}
                    if wrong:
                        taken = ", ".join(f"{found} {n}" for found, n in wrong.items())
                        lines.append(f"    {kind}: {drawn} taken for {taken}")
        return "\n".join(lines)


def validate(count: int = 600, seed: int = 0, size: int = 64) -> Validation:
    """Renders ``count`` held-out prompts, at ``size`` x ``size`` pixels, and judges them rightly and wrongly.

    ``ValueError`` for what :func:`held_out_prompts` and :func:`render_prompt` do not take, and fewer than 2 prompts.
    """
    prompts = held_out_prompts(count, seed)
    if count < 2:
        raise ValueError(f"count must be at least 2, else there is nothing to shuffle, got {count}")
    pictures = [render_prompt(prompt, seed=i, size=size) for i, prompt in enumerate(prompts)]
    spoilt, confusions = {}, {}
    for how, spoil in SPOILS.items():
        spoilt[how], confusions[how] = _confusions(spoil, size, np.random.default_rng(seed))
    return Validation(judge_pictures(prompts, pictures), shuffled(prompts, pictures, seed), spoilt, confusions)


def shuffled(prompts: Sequence[Prompt], pictures: Sequence[np.ndarray], seed: int = 0) -> dict[str, Score]:
    """Each picture judged by SHUFFLES other prompts, never its own: the rate of correct ones by category."""
    for prompt in prompts:
        check_ask(prompt.ask)
    seen = [look(picture) for picture in pictures]
    order = np.random.default_rng(seed).permutation(len(prompts))
    correct, total = Counter(), Counter()
    for turn in range(1, min(SHUFFLES, len(prompts) - 1) + 1):
        for own, other in zip(order, np.roll(order, turn), strict=True):
            ask = prompts[other].ask
            total[ask.category] += 1
            correct[ask.category] += judge(seen[own], ask).correct
    return {name: Score(correct[name], total[name]) for name in CATEGORIES if total[name]}


Spoil = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _confusions(spoil: Spoil, size: int, rng: np.random.Generator) -> tuple[Score, dict[str, Any]]:
    tables = {
        kind: {name: Counter() for name in names}
        for kind, names in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES))
    }
    correct = total = 0
    for shape in SHAPES:
        for colour in COLOURS:
            for name in SIZES:
                ask = Ask("single object", (Wanted(shape, colour, name),))
                for _ in range(KNOWN):
                    picture = spoil(render_prompt(Prompt("", ask), int(rng.integers(2**31)), size), rng)
                    found = look(picture).found
                    right = True
                    for kind, drawn in (("shape", shape), ("colour", colour), ("size", name)):
                        taken = getattr(found[0], kind) or NAMELESS if len(found) == 1 else NOTHING
                        tables[kind][drawn][taken] += 1
                        right &= taken == drawn
                    correct += right
                    total += 1
    plain = {kind: {drawn: dict(counts) for drawn, counts in table.items()} for kind, table in tables.items()}
    return Score(correct, total), plain


def _jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    with io.BytesIO() as buffer:
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer).convert("RGB"))


def _blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def _noisy(picture: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    return np.clip(picture + rng.normal(0, sigma, picture.shape), 0, 255).round().astype(np.uint8)


# radii and standard deviations at 64 pixels' size in pixels and levels: what a tokenizer of this size does, and worse
SPOILS: dict[str, Spoil] = {
    "as drawn": lambda picture, rng: picture,
    "blur 0.7 px": lambda picture, rng: _blurred(picture, 0.7),
    "blur 1.5 px": lambda picture, rng: _blurred(picture, 1.5),
    "noise 4/255": lambda picture, rng: _noisy(picture, rng, 4),
    "noise 16/255": lambda picture, rng: _noisy(picture, rng, 16),
    "JPEG 60": lambda picture, rng: _jpeg(picture, 60),
    "JPEG 30": lambda picture, rng: _jpeg(picture, 30),
}
