"""A folder of pictures: captions in metadata.jsonl or in a .txt beside each picture, or none."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from dcar_fast.training.data.examples import BrokenExample, Example, Skip
from dcar_fast.training.data.order import AUGMENTATION, EpochOrder, augmentation, fingerprint
from dcar_fast.training.data.pictures import SUFFIXES, decode_picture, square

METADATA = "metadata.jsonl"
CAPTION_FIELDS = ("text", "caption", "prompt")


class FolderSource:
    """Random access to a folder's pictures (subfolders too), in a new order every epoch.

    captions: each picture needs one. From metadata.jsonl if the folder has it (a JSON object per line: "file_name",
    relative to the folder, and "text", "caption" or "prompt"), else from a .txt of the picture's name beside it.
    size, random_crop, flip: as :func:`dcar_fast.training.data.pictures.square`; crops depend on (seed, index).

    An example that cannot be used (unreadable, too small, without caption) is left out; the next good one of the
    epoch's order takes its place. ``ValueError`` if the folder has no pictures, or metadata.jsonl is malformed; from
    :meth:`example` if nothing in it can be used.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        seed: int = 0,
        captions: bool = True,
        random_crop: bool = False,
        flip: bool = False,
    ) -> None:
        self.path = Path(path)
        self.size, self.seed, self.captions, self.random_crop, self.flip = size, seed, captions, random_crop, flip
        if not self.path.is_dir():
            raise ValueError(f"data.path must be a folder of pictures, {str(path)!r} is none")
        self._skips: list[Skip] = []
        self._broken: dict[int, str] = {}  # and why
        metadata = self.path / METADATA
        self._texts: list[str] | None = None  # None: read from the .txt files when needed
        if captions and metadata.is_file():
            self._files, self._texts = self._read_metadata(metadata)
        else:
            self._files = _list_pictures(self.path)
        if not self._files:
            why = summary(skip.reason for skip in self._skips) or f"known are {', '.join(SUFFIXES)}"
            raise ValueError(f"data.path: {str(path)!r} has no pictures that can be used: {why}")
        self._order = EpochOrder(len(self._files), seed)

    def __len__(self) -> int:
        """Pictures listed; those that prove unusable when they are read are among them."""
        return len(self._files)

    @property
    def fingerprint(self) -> str:
        """Of the files' names and the seed: what the order of examples depends on."""
        return fingerprint(self._files, self.seed)

    def example(self, index: int) -> Example:
        """Example ``index`` >= 0 of the endless stream."""
        epoch, place = divmod(index, len(self._files))
        order = self._order.epoch(epoch)
        for i in chain(order[place:], order[:place]):
            if int(i) in self._broken:
                continue
            try:
                return self._load(int(i), index)
            except BrokenExample as error:
                self._broken[int(i)] = error.reason
                self._skips.append(Skip(str(self.path / self._files[i]), error.reason, error.detail))
        why = summary(self._broken.values())
        raise ValueError(f"data.path: none of the {len(self._files)} pictures in {str(self.path)!r} can be used: {why}")

    def take_skips(self) -> list[Skip]:
        """What was found to be unusable since the last call."""
        skips, self._skips = self._skips, []
        return skips

    def _load(self, i: int, index: int) -> Example:
        file = self.path / self._files[i]
        caption = self._caption(i) if self.captions else ""
        try:
            data = file.read_bytes()
        except OSError as error:
            raise BrokenExample("unreadable file", error.strerror) from error
        rng = augmentation(AUGMENTATION, self.seed, index) if self.random_crop or self.flip else None
        image = square(decode_picture(data, self.size), self.size, rng, self.random_crop, self.flip)
        return Example(self._files[i], image, caption)

    def _caption(self, i: int) -> str:
        if self._texts is not None:
            return self._texts[i]
        try:
            text = (self.path / self._files[i]).with_suffix(".txt").read_text(encoding="utf-8-sig")
        except FileNotFoundError as error:
            raise BrokenExample("no caption", "there is no .txt of its name") from error
        except (OSError, UnicodeDecodeError) as error:
            raise BrokenExample("unreadable caption", error) from error
        return checked_caption(text)

    def _read_metadata(self, metadata: Path) -> tuple[list[str], list[str]]:
        """File names and captions, sorted by name: the order of lines does not matter."""
        try:
            lines = metadata.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{metadata} cannot be read: {error}") from error
        names, captions = set(), {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name, text = _parse_line(line, f"{metadata}, line {number}")
            if name in names:
                self._skips.append(Skip(f"{metadata}, line {number}", "duplicate name", name))
                continue
            names.add(name)
            try:
                captions[name] = checked_caption(text)
            except BrokenExample as error:
                self._skips.append(Skip(str(self.path / name), error.reason, error.detail))
        usable = sorted(captions)
        return usable, [captions[name] for name in usable]


def checked_caption(text: str | None) -> str:
    """The caption with runs of white space made single; :class:`BrokenExample` if there is none or it is empty."""
    if text is None:
        raise BrokenExample("no caption")
    text = " ".join(text.split())
    if not text:
        raise BrokenExample("empty caption")
    return text


def caption_of(row: dict[str, Any]) -> str | None:
    """The first of CAPTION_FIELDS that a JSON object has, None without; :class:`TypeError` if it is no string."""
    for field in CAPTION_FIELDS:
        if isinstance(row.get(field), str):
            return row[field]
        if row.get(field) is not None:
            raise TypeError(f"{field!r} must be a string, got {row[field]!r:.60}")
    return None


def _parse_line(line: str, where: str) -> tuple[str, str | None]:
    """(file name, caption) of a line of metadata.jsonl."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise ValueError(f'{where} must be an object with a string "file_name", got {line:.60}')
    name = PurePosixPath(row["file_name"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{where}: file_name must lie in the folder, got {row['file_name']!r}")
    try:
        return name.as_posix(), caption_of(row)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _list_pictures(path: Path) -> list[str]:
    """Names relative to ``path`` with a known suffix, sorted; hidden files and folders are left out."""
    found = []
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append((Path(folder) / name).relative_to(path).as_posix())
    return sorted(found)


def summary(reasons: Iterable[str]) -> str:
    """Reasons with their counts, the most frequent first."""
    return ", ".join(f"{count} x {reason}" for reason, count in Counter(reasons).most_common())
