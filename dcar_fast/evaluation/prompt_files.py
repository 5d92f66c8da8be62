"""Prompts of MJHQ-30K and GenEval to folders of images, in the layouts that their tools read.

The prompt files come from the benchmarks; nothing is downloaded. A run that was broken off goes on where it stopped,
and several processes share the work (torchrun), as with :meth:`dcar_fast.DCARPipeline.generate_to`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcar_fast._files import write_atomically
from dcar_fast._inputs import image_seeds
from dcar_fast.bulk.run import Report
from dcar_fast.checkpoints import read_json
from dcar_fast.pipeline import DCARPipeline

GENEVAL_IMAGES = "images"  # GenEval's tool looks at folders whose names are numbers only


@dataclass(frozen=True)
class MjhqPrompt:
    """One entry of MJHQ-30K's meta_data.json; its image is called ``id``."""

    id: str
    category: str
    prompt: str


def read_mjhq(path: str | Path) -> list[MjhqPrompt]:
    """MJHQ-30K's meta_data.json, an object of id -> {"category", "prompt"}, in its order. ``ValueError`` naming the
    entry that is none."""
    rows = read_json(Path(path))
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    prompts = []
    for name, row in rows.items():
        texts = [row.get(key) for key in ("category", "prompt")] if isinstance(row, dict) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f'{path}: {name!r} must be an object with texts "category" and "prompt", got {row!r:.80}')
        category = texts[0]
        if not category.replace("_", "").replace("-", "").replace(" ", "").isalnum():
            raise ValueError(f"{path}: the category of {name!r} must be a plain name, got {category!r:.80}")
        prompts.append(MjhqPrompt(name, category, texts[1]))
    return prompts


def draw_mjhq(
    pipeline: DCARPipeline, prompts: Sequence[MjhqPrompt], folder: str | Path, seed: int = 0, **options: Any
) -> list[Report]:
    """Images FOLDER/<category>/<id>.png, as MJHQ-30K has its own: clean-fid compares the folders, whole or by category.

    Prompt i gets seed + i. options: further arguments of ``generate_to``. One report per category.
    """
    seeds = image_seeds(seed, len(prompts))
    reports = []
    for category in dict.fromkeys(p.category for p in prompts):
        chosen = [i for i, p in enumerate(prompts) if p.category == category]
        report = pipeline.generate_to(
            Path(folder) / category,
            [prompts[i].prompt for i in chosen],
            seed=[seeds[i] for i in chosen],
            names=[prompts[i].id for i in chosen],
            **options,
        )
        reports.append(report)
    return reports


def read_geneval(path: str | Path) -> list[dict[str, Any]]:
    """GenEval's evaluation_metadata.jsonl: one object with a "prompt" per line. ``ValueError`` naming the line that is
    none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f'{path}, line {number} must be an object with a text "prompt", got {line:.80}')
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    return rows


def draw_geneval(
    pipeline: DCARPipeline,
    rows: Sequence[dict[str, Any]],
    folder: str | Path,
    samples: int = 4,
    seed: int = 0,
    **options: Any,
) -> Report:
    """``samples`` images per row as GenEval's evaluate_images.py reads them: FOLDER/00000/metadata.jsonl (the row) and
    FOLDER/00000/samples/0000.png, ...

    Sample k of row i gets seed + i samples + k. All are drawn into FOLDER/images first, in full batches; when all are
    there (``Report.complete``) the tree is made of links to them, or copies where the file system has no links.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a positive integer, got {samples!r}")
    folder = Path(folder)
    names = [f"{i:05d}-{k:04d}.png" for i in range(len(rows)) for k in range(samples)]
    prompts = [row["prompt"] for row in rows for _ in range(samples)]
    report = pipeline.generate_to(folder / GENEVAL_IMAGES, prompts, seed=seed, names=names, **options)
    if report.complete:
        for i, row in enumerate(rows):
            _write_row(
                folder / f"{i:05d}", row, [folder / GENEVAL_IMAGES / f"{i:05d}-{k:04d}.png" for k in range(samples)]
            )
    return report


def _write_row(folder: Path, row: dict[str, Any], images: list[Path]) -> None:
    for k, image in enumerate(images):
        write_atomically(folder / "samples" / f"{k:04d}.png", lambda temporary, image=image: _link(image, temporary))
    # last: a folder with metadata is a whole one
    text = json.dumps(row, ensure_ascii=False) + "\n"
    write_atomically(folder / "metadata.jsonl", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _link(source: Path, target: Path) -> None:
    target.unlink()
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
