"""The results folder: settings.json, which says what the results are of, and a JSON file per finished cell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcar_fast._files import check_writable, write_atomically

FORMAT = 1
NAME = re.compile(r"(?P<part>.+)-seed(?P<seed>\d+)\.json")


class Store:
    """``settings``: plain JSON values by name, None for what is not known; ``ValueError`` naming those that differ from
    what the folder's results are of, and if it cannot be written. What was not known before is added."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        path = folder / "settings.json"
        check_writable(path)
        wanted = json.loads(json.dumps({"format": FORMAT, **settings}))
        found = read(path) if path.exists() else {}
        old, new = _flat(found), _flat(wanted)
        differing = [
            f"{name} {old[name]!r} instead of {new[name]!r}"
            for name in sorted(old.keys() & new.keys())
            if old[name] != new[name] and None not in (old[name], new[name])
        ]
        if differing:
            raise ValueError(f"{folder} holds results of other settings: {'; '.join(differing)}; choose another folder")
        self.settings = {**wanted, **{name: value for name, value in found.items() if value is not None}}
        if self.settings != found:
            write(path, self.settings)

    def cell(self, study: str, part: str, seed: int) -> Path:
        """The file of a cell; where it is, the cell is finished."""
        return self.folder / "cells" / study / f"{slug(part)}-seed{seed}.json"

    def cells(self) -> Iterator[dict[str, Any]]:
        """Every finished cell, by study, part and seed. ``ValueError`` for a file that holds none."""
        for path in sorted((self.folder / "cells").glob("*/*.json")):
            match, cell = NAME.fullmatch(path.name), read(path)
            if match is None or not {"study", "part", "seed", "outcome"} <= cell.keys():
                raise ValueError(f"{path} is no result of this benchmark")
            yield cell

    def training(self, name: str) -> Path:
        """The folder of a training."""
        return self.folder / "trainings" / slug(name)


def read(path: Path) -> dict[str, Any]:
    """A JSON object; ``ValueError`` with the file's name for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def write(path: Path, value: Any) -> None:
    """JSON, atomically; what is no finite number is refused (``ValueError``)."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
