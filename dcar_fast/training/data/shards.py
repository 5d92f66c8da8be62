"""Tar shards of pictures and captions (webdataset), local or streamed, in an order that a resumed run continues.

The shards are dealt out to lanes, one per decoding process of each rank; a lane reads its share of every epoch in an
order of its own. All of it follows from (seed, epoch), so a place in a lane is four numbers.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from dcar_fast.training.data.examples import BrokenExample, Example, Skip
from dcar_fast.training.data.folder import caption_of, checked_caption, summary
from dcar_fast.training.data.order import SHARD_AUGMENTATION, SHARD_ORDER, SHARD_WINDOW, augmentation, fingerprint
from dcar_fast.training.data.pictures import decode_picture, square
from dcar_fast.training.data.tar_files import PICTURES, read_samples, webdataset

WINDOW = 512
"""Samples of a shard that are shuffled together; a lane holds that many undecoded ones in memory."""


@dataclass(frozen=True)
class Place:
    """Where a lane goes on: ``shard`` counts the epoch's share, ``window`` the shard's windows, ``sample`` in it."""

    epoch: int = 0
    shard: int = 0
    window: int = 0
    sample: int = 0

    @classmethod
    def from_json(cls, values: Any) -> Place:
        """The reverse of ``asdict``; ``ValueError`` for anything else."""
        fields = ("epoch", "shard", "window", "sample")
        ok = isinstance(values, dict) and sorted(values) == sorted(fields)
        if not ok or any(type(value) is not int or value < 0 for value in values.values()):
            raise ValueError(f"position: a place in tar shards has {list(fields)} >= 0, got {values!r:.100}")
        return cls(**values)

    to_json = asdict


class ShardSource:
    """Examples from tar shards.

    urls: as :func:`expand_shards` gives them. With fewer shards than lanes every lane reads all shards and takes every
    n-th sample. Each sample (a jpg, jpeg, png or webp, and with ``captions`` a txt, or a json with "text", "caption" or
    "prompt") is given once an epoch; lanes pass from one epoch to the next each in its own time. size, random_crop,
    flip: as :func:`dcar_fast.training.data.pictures.square`.

    What cannot be used is left out: a sample, or the rest of a shard that is damaged or breaks off.
    """

    def __init__(
        self,
        urls: list[str],
        size: int,
        seed: int = 0,
        captions: bool = True,
        random_crop: bool = False,
        flip: bool = False,
    ) -> None:
        if not urls:
            raise ValueError("data.path names no shards")
        webdataset()
        self.urls, self.size, self.seed, self.captions = urls, size, seed, captions
        self.random_crop, self.flip = random_crop, flip
        self._skips: list[Skip] = []

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what the order of examples depends on besides lanes: shards, seed, window."""
        return fingerprint(self.urls, self.seed, WINDOW)

    def examples(self, lane: int, lanes: int, place: Place) -> Iterator[tuple[Example, Place]]:
        """The endless examples of a lane from ``place`` on, each with the place right behind it.

        To get there at most one shard is read again, and nothing is decoded. ``ValueError`` when all shards have been
        tried in vain since the last example.
        """
        tried: set[int] = set()  # shards read to the end since the last example, and what was found in them
        reasons: Counter[str] = Counter()
        fruitful = place.epoch
        for epoch in count(place.epoch):
            for ordinal, shard in enumerate(self._share(epoch, lane, lanes)):
                if epoch == place.epoch and ordinal < place.shard:
                    continue
                start = place if (epoch, ordinal) == (place.epoch, place.shard) else Place(epoch, ordinal)
                for result, behind in self._shard(shard, lane, lanes, start):
                    if isinstance(result, Example):
                        tried, reasons, fruitful = set(), Counter(), epoch
                        yield result, behind
                    else:
                        self._skips.append(result)
                        reasons[result.reason] += 1
                tried.add(shard)
            # a lane may have no sample of a short shard in one epoch; in ``lanes`` epochs it has each in turn
            if len(tried) == len(self.urls) and epoch - fruitful >= lanes:
                why = summary(reasons.elements()) or "they are empty"
                raise ValueError(f"data.path: nothing in {len(self.urls)} shards can be used: {why}")

    def take_skips(self) -> list[Skip]:
        """What was found to be unusable since the last call."""
        skips, self._skips = self._skips, []
        return skips

    def _share(self, epoch: int, lane: int, lanes: int) -> list[int]:
        """Numbers of the shards that a lane reads in an epoch, in order."""
        order = np.random.default_rng([SHARD_ORDER, self.seed, epoch]).permutation(len(self.urls)).tolist()
        return order[lane::lanes] if len(self.urls) >= lanes else order

    def _shard(self, shard: int, lane: int, lanes: int, start: Place) -> Iterator[tuple[Example | Skip, Place]]:
        """The lane's samples of a shard, shuffled within windows, from ``start`` on."""
        broken: list[Skip] = []
        numbered = enumerate(read_samples(self.urls[shard], broken.append))
        if len(self.urls) < lanes:
            numbered = ((i, sample) for i, sample in numbered if (i + start.epoch) % lanes == lane)
        for _ in islice(numbered, start.window * WINDOW):
            pass  # read, not decoded
        for window in count(start.window):
            samples = list(islice(numbered, WINDOW))
            order = np.random.default_rng([SHARD_WINDOW, self.seed, start.epoch, shard, window]).permutation(
                len(samples)
            )
            for k in range(start.sample if window == start.window else 0, len(samples)):
                behind = Place(start.epoch, start.shard, window, k + 1)
                yield self._decode(*samples[order[k]], shard, start.epoch), behind
            if len(samples) < WINDOW:
                break
        for skip in broken:
            yield skip, Place(start.epoch, start.shard + 1)

    def _decode(self, number: int, sample: dict[str, Any], shard: int, epoch: int) -> Example | Skip:
        name = f"{self.urls[shard]}: {sample['__key__']}"
        try:
            caption = checked_caption(_caption(sample)) if self.captions else ""
            data = next((sample[suffix] for suffix in PICTURES if suffix in sample), None)
            if data is None:
                raise BrokenExample("no picture")
            key = (self.seed, epoch, shard, number)
            rng = augmentation(SHARD_AUGMENTATION, *key) if self.random_crop or self.flip else None
            image = square(decode_picture(data, self.size), self.size, rng, self.random_crop, self.flip)
        except BrokenExample as error:
            return Skip(name, error.reason, error.detail)
        return Example(sample["__key__"], image, caption)


def expand_shards(path: str) -> list[str]:
    """The shards that ``data.path`` names, in a fixed order.

    A folder (all its .tar files), a glob of local files, or a brace pattern of paths, URLs or "pipe:" commands such as
    "pipe:aws s3 cp s3://bucket/{000..099}.tar -" (several are joined by "::", ${NAME} stands for the environment's
    WDS_NAME, as webdataset has it). ``ValueError`` if a local file is missing or nothing matches.
    """
    if not path:
        raise ValueError("data.path must name tar shards, got ''")
    if Path(path).is_dir():
        path = str(Path(glob.escape(path)) / "*.tar")
        patterns = [path]
    else:
        try:
            patterns = webdataset().shardlists.expand_urls(path)
        except (AssertionError, ValueError) as error:  # an unset variable, an unbalanced brace
            raise ValueError(f"data.path {path!r}: {error}") from error
    urls: list[str] = []
    for pattern in patterns:
        if pattern.startswith("pipe:") or "://" in pattern:
            urls.append(pattern)
        else:
            urls.extend(_local_shards(pattern))
    return urls


def _local_shards(pattern: str) -> list[str]:
    if Path(pattern).is_file():
        return [pattern]
    found = sorted(name for name in glob.glob(pattern) if Path(name).is_file())
    if not found:
        raise ValueError(f"data.path: there is no shard {pattern!r}")
    return found


def _caption(sample: dict[str, Any]) -> str | None:
    """The txt, or else what the json says."""
    try:
        if "txt" in sample:
            return sample["txt"].decode("utf-8-sig")
        if "json" not in sample:
            return None
        row = json.loads(sample["json"])
        if not isinstance(row, dict):
            raise BrokenExample("unreadable caption", "the json is no object")
        return caption_of(row)
    except (ValueError, TypeError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BrokenExample("unreadable caption", error) from error
