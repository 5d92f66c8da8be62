"""ShapesEval: how often pictures of the ``shapes`` data show what their prompts say, overall and by GenEval's six
categories.

The prompts are combinations that the training data never shows. The checker
(:mod:`dcar_fast.evaluation.shapes_checker`) looks at the pictures alone.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcar_fast._files import write_atomically
from dcar_fast.evaluation.shapes_checker import check
from dcar_fast.images import image_to_tensor, open_image, tensor_to_pixels
from dcar_fast.training.shapes.scene import CATEGORIES, Prompt

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile


@dataclass(frozen=True)
class Score:
    """``correct`` of ``total`` pictures."""

    correct: int
    total: int

    @property
    def rate(self) -> float:
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate (E. B. Wilson, 1927): right for small numbers and rates near 0 and 1."""
        if not self.total:
            return 0.0, 1.0
        square = Z_95**2 / self.total
        middle = (self.rate + square / 2) / (1 + square)
        half = Z_95 / (1 + square) * math.sqrt(self.rate * (1 - self.rate) / self.total + square / (4 * self.total))
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_dict(self) -> dict[str, Any]:
        return {"correct": self.correct, "total": self.total, "rate": self.rate, "interval_95": list(self.interval)}


@dataclass(frozen=True)
class Judged:
    """One picture: its number, prompt, category, whether it is correct, and if not, the kinds of errors and why."""

    index: int
    prompt: str
    category: str
    correct: bool
    kinds: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class ShapesReport:
    """The judgement of all pictures, in the order of the prompts."""

    judged: tuple[Judged, ...]

    @property
    def overall(self) -> Score:
        return _score(self.judged)

    @property
    def categories(self) -> dict[str, Score]:
        """By category, those without prompts left out."""
        groups = {name: [j for j in self.judged if j.category == name] for name in CATEGORIES}
        return {name: _score(group) for name, group in groups.items() if group}

    @property
    def failures(self) -> list[Judged]:
        return [j for j in self.judged if not j.correct]

    @property
    def kinds(self) -> dict[str, int]:
        """How many pictures have each kind of error; a picture can have several."""
        return dict(Counter(kind for j in self.failures for kind in j.kinds).most_common())

    def to_dict(self) -> dict[str, Any]:
        return {
            "overall": self.overall.to_dict(),
            "categories": {name: score.to_dict() for name, score in self.categories.items()},
            "errors": self.kinds,
            "pictures": [asdict(j) for j in self.judged],
        }

    def table(self) -> str:
        """For people: rates in percent with their 95 % intervals."""
        rows = [*self.categories.items(), ("overall", self.overall)]
        lines = [f"{'category':<18}{'correct':>9}{'of':>6}{'rate':>9}   95 % interval"]
        for name, score in rows:
            low, high = score.interval
            lines.append(
                f"{name:<18}{score.correct:>9}{score.total:>6}{100 * score.rate:>8.1f}%   "
                f"{100 * low:.1f} .. {100 * high:.1f}%"
            )
        if self.kinds:
            lines.append("errors: " + ", ".join(f"{kind} {count}" for kind, count in self.kinds.items()))
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Writes :meth:`to_dict` as JSON, atomically."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def judge_pictures(prompts: Sequence[Prompt], pictures: Iterable[np.ndarray]) -> ShapesReport:
    """One (H, W, 3) uint8 picture per prompt, in order. ``ValueError`` for too few or too many, or no prompts."""
    if not prompts:
        raise ValueError("prompts must hold at least one Prompt, got none")
    judged = []
    for picture in pictures:
        if len(judged) == len(prompts):
            raise ValueError(f"pictures: more than the {len(prompts)} prompts came")
        prompt = prompts[len(judged)]
        verdict = check(picture, prompt.ask)
        judged.append(
            Judged(len(judged), prompt.text, prompt.ask.category, verdict.correct, verdict.kinds, verdict.reason)
        )
    if len(judged) != len(prompts):
        raise ValueError(f"pictures: {len(judged)} came for {len(prompts)} prompts")
    return ShapesReport(tuple(judged))


def picture_files(folder: str | Path, prompts: Sequence[Prompt]) -> list[Path]:
    """00000.png, 00001.png, ... of the prompts in a folder.

    ``ValueError`` if one is missing, or if the folder's metadata.jsonl names other prompts.
    """
    folder = Path(folder)
    files = [folder / f"{i:05d}.png" for i in range(len(prompts))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(files)} pictures, the first is {missing[0]}")
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        named = _prompts_by_file(metadata)
        for file, prompt in zip(files, prompts, strict=True):
            if named.get(file.name, prompt.text) != prompt.text:
                raise ValueError(
                    f"{metadata}: {file.name} was made for {named[file.name]!r:.80}, the prompt of that number is "
                    f"{prompt.text!r:.80}; seed and count must be those of the pictures"
                )
    return files


def read_picture(file: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB; ``ValueError`` if it is no readable image."""
    return tensor_to_pixels(image_to_tensor(open_image(file), str(file)))[0].numpy()


def _score(judged: Sequence[Judged]) -> Score:
    return Score(sum(j.correct for j in judged), len(judged))


def _prompts_by_file(metadata: Path) -> dict[str, str]:
    try:
        rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {row["file_name"]: row["prompt"] for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{metadata} is no list of files and prompts: {error}") from error
