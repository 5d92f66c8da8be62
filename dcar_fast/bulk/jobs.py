"""What is to be drawn: prompts with their seeds and file names, from a list or a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcar_fast._inputs import image_seeds
from dcar_fast.models.text_encoder import check_prompts
from dcar_fast.noise import check_seeds, is_seed

FIELDS = ("prompt", "seed", "name")  # of a line of a .jsonl file
LONGEST_NAME = 200  # bytes: file systems take 255, and a temporary name is longer


@dataclass(frozen=True)
class Job:
    """One image: what it shows, its seed, and the name of its PNG."""

    prompt: str
    seed: int
    file_name: str


def make_jobs(
    prompts: Sequence[str], seed: int | Sequence[int] = 0, names: Sequence[str | None] | None = None
) -> list[Job]:
    """One job per prompt. seed: prompt i gets seed + i, or one seed each; names: of the files (None: 00000.png, ...).

    ``ValueError`` for no prompts, for what is no text, no seed or no plain file name, and for two equal names.
    """
    check_prompts(prompts)
    if seed is None:
        raise ValueError("seed must be given, else a run could not be resumed; got None")
    seeds = image_seeds(seed, len(prompts))
    if names is None:
        names = [None] * len(prompts)
    elif isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"names must be a list of file names, got {type(names).__name__}")
    if len(names) != len(prompts):
        raise ValueError(f"names: {len(names)} names came for {len(prompts)} prompts")
    files = [_file_name(name, i) for i, name in enumerate(names)]
    _check_different(files)
    return [Job(*job) for job in zip(prompts, seeds, files, strict=True)]


def read_jobs(path: str | Path, seed: int = 0) -> list[Job]:
    """The jobs of a text file (one prompt per line) or of a .jsonl file: objects with "prompt", and "seed" and "name"
    where line i is to have others than seed + i and its number.

    ``ValueError`` naming file and line for an empty line, an unknown field, or anything that is not as above.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if lines[-1] == "":  # a file ends with a line break
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty, it must hold one prompt per line")
    if not is_seed(seed):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    parse = _parse_json if path.suffix.lower() == ".jsonl" else _parse_text
    rows = [parse(line, f"{path}, line {i + 1}") for i, line in enumerate(lines)]
    try:
        return make_jobs(
            [row["prompt"] for row in rows],
            [row.get("seed", int(seed) + i) for i, row in enumerate(rows)],
            [row.get("name") for row in rows],
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse_text(line: str, where: str) -> dict[str, Any]:
    if not line.strip():
        raise ValueError(f"{where} is empty, every line must hold a prompt")
    return {"prompt": line}


def _parse_json(line: str, where: str) -> dict[str, Any]:
    if not line.strip():
        raise ValueError(f'{where} is empty, every line must hold an object with "prompt"')
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'{where} must be an object with a string "prompt", got {line:.60}')
    if set(row) - set(FIELDS):
        raise ValueError(f"{where}: unknown field {sorted(set(row) - set(FIELDS))[0]!r}, allowed are {list(FIELDS)}")
    if not row["prompt"].strip():
        raise ValueError(f"{where} has an empty prompt")
    if "seed" in row:
        try:
            check_seeds([row["seed"]])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return row


def _file_name(name: str | None, index: int) -> str:
    if name is None:
        return f"{index:05d}.png"
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set('/\\:*?"<>|')
    if not plain or not name.strip() or name.startswith(".") or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"names[{index}] must be a plain file name of at most {LONGEST_NAME} bytes without folder, got {name!r:.60}"
        )
    return name if name.lower().endswith(".png") else f"{name}.png"


def _check_different(files: list[str]) -> None:
    first: dict[str, int] = {}
    for i, file in enumerate(files):
        j = first.setdefault(file.casefold(), i)  # on some systems A.png is a.png
        if j != i:
            raise ValueError(f"names must differ: prompts {j} and {i} both go to {file}")
