"""Batches without end for one process of a training, decoded by worker processes, from any place on."""

from __future__ import annotations

import atexit
import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from dcar_fast.training.data.cached import CachedSource
from dcar_fast.training.data.examples import Batch, CachedExample, Example, RandomAccess, Skip
from dcar_fast.training.data.folder import FolderSource
from dcar_fast.training.data.shards import Place, ShardSource, expand_shards
from dcar_fast.training.data.split import Split, check_int
from dcar_fast.training.data.workers import kill, signals_wait, worker_arguments

if TYPE_CHECKING:
    from dcar_fast.training.settings import DataSettings

log = logging.getLogger(__name__)

KINDS = ("shapes", "folder", "shards", "cache")


_open: weakref.WeakSet[Loader] = weakref.WeakSet()


class Loader(Iterator[Batch]):
    """The batches, one per micro-batch. Use it with ``with``, or :meth:`close` it, to stop its worker processes.

    skipped: how many files or examples were left out, by reason; each is counted and logged once. As workers read
    ahead, but what they found comes with the batches, a resumed run counts what it meets from its start on.
    """

    def __init__(self, batches: DataLoader, positions: _Positions) -> None:
        self.skipped: Counter[str] = Counter()
        self._seen: set[tuple[str, str]] = set()
        self._positions = positions
        self._batches: Iterator[tuple[Batch, list[Skip]]] | None = None
        with signals_wait():
            self._batches = iter(batches)
        _open.add(self)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise ValueError("the loader is closed")
        batch, skips = next(self._batches)
        self._count(skips)
        self._positions.complete(batch)
        return batch

    def close(self) -> None:
        """Ends the worker processes; no batches come after it."""
        # DataLoader has no public way to end them; dropping the iterator does, but not while an exception refers to it,
        # and takes seconds for each worker if it is left to the garbage collector.
        shut_down = getattr(self._batches, "_shutdown_workers", None)
        workers = getattr(self._batches, "_workers", [])
        self._batches = None
        if shut_down is not None:
            try:
                shut_down()
            finally:
                kill(workers)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _count(self, skips: list[Skip]) -> None:
        for skip in skips:
            if (skip.name, skip.reason) not in self._seen:
                self._seen.add((skip.name, skip.reason))
                self.skipped[skip.reason] += 1
                log.warning("%s is left out: %s%s", skip.name, skip.reason, f" ({skip.detail})" if skip.detail else "")


def make_loader(
    settings: DataSettings,
    *,
    seed: int | None = None,
    batch_size: int,
    world_size: int = 1,
    rank: int = 0,
    accumulation: int = 1,
    start_step: int = 0,
    position: dict[str, Any] | None = None,
    captions: bool = True,
) -> Loader:
    """The endless batches of process ``rank`` of ``world_size``, ``accumulation`` to a step.

    batch_size: rows of the global batch. seed: of the order and the crops, ``settings.seed`` if None. start_step: steps
    done. position: of the last batch used (``Batch.position``, this process's own): goes on right behind it; tar shards
    need it wherever start_step > 0. captions: pictures without one are left out; if False, none are read
    from folders and shards.

    With shapes, folder and cache the rows of a step are the same however they are split. ``ValueError`` for settings
    that do not fit together, data that is not there, and a position of other data or another split.
    """
    split = Split(batch_size, world_size, rank, accumulation)
    check_int("start_step", start_step, 0)
    seed = settings.seed if seed is None else seed
    check_int("seed", seed, 0)
    check_int("data.workers", settings.workers, 0)
    position = position or None
    if position is not None and position.get("kind") != settings.kind:
        raise ValueError(f"position is of data.kind {position.get('kind')!r}, the settings say {settings.kind!r}")
    if settings.kind == "shards":
        return _shard_loader(settings, split, seed, start_step, position, captions)
    source = make_source(settings, seed, captions)
    return random_access_loader(source, split, settings.kind, settings.workers, start_step, position)


def make_source(settings: DataSettings, seed: int, captions: bool = True) -> RandomAccess:
    """The source of the kinds "shapes", "folder" and "cache"."""
    if settings.kind in ("shapes", "cache") and (settings.random_crop or settings.flip):
        why = "captions say where things are" if settings.kind == "shapes" else "a cache holds no pictures"
        raise ValueError(f"data.random_crop and data.flip must be off with data.kind {settings.kind!r}: {why}")
    if settings.kind == "shapes":
        from dcar_fast.training.shapes import ShapesSource

        return ShapesSource(settings.size, seed, variety=settings.variety)
    if settings.kind not in KINDS or settings.kind == "shards":
        raise ValueError(f"data.kind must be one of {KINDS}, got {settings.kind!r}")
    if not settings.path:
        raise ValueError(f"data.path must name a folder with data.kind {settings.kind!r}, got ''")
    if settings.kind == "cache":
        return CachedSource(settings.path, seed)
    return FolderSource(settings.path, settings.size, seed, captions, settings.random_crop, settings.flip)


def random_access_loader(
    source: RandomAccess,
    split: Split,
    kind: str = "custom",
    workers: int = 0,
    start_step: int = 0,
    position: dict[str, Any] | None = None,
) -> Loader:
    """The same for any :class:`RandomAccess` source. kind: names it in positions; position, if given, must agree with
    start_step > 0."""
    step, micro = start_step, 0
    if position is not None:
        step, micro = position.get("step"), position.get("micro_batch")
        ok = type(step) is int and type(micro) is int and step >= 0 and 0 <= micro < split.accumulation
        if not ok or (start_step and step != start_step):
            allowed = f"step {start_step or '>= 0'} and micro_batch in 0..{split.accumulation - 1}"
            raise ValueError(f"position must have {allowed}, got {position!r:.200}")
    data = getattr(source, "fingerprint", "")
    identity = {"kind": kind, "data": data} if data else {"kind": kind}
    # positions of earlier versions name no data
    if position is not None and position.get("data", data) != data:
        raise ValueError(f"position is of other data of kind {kind!r}: pictures came or went, or the seed is another")
    batches = DataLoader(
        _Rows(source),
        batch_size=None,
        sampler=_Order(split, identity, step, micro),
        **worker_arguments(workers),
    )
    return Loader(batches, _Positions())


def _shard_loader(
    settings: DataSettings, split: Split, seed: int, step: int, position: dict[str, Any] | None, captions: bool
) -> Loader:
    urls = expand_shards(settings.path)
    source = ShardSource(urls, settings.size, seed, captions, settings.random_crop, settings.flip)
    own = max(1, settings.workers)  # lanes of this process
    if len(urls) < own * split.world_size:
        log.warning("%d shards for %d decoding processes: each reads them all", len(urls), own * split.world_size)
    positions = _ShardPositions(source.fingerprint, split, own)
    if position is not None:
        positions.load(position)
    elif step:
        raise ValueError(f"position must be given with tar shards to continue at step {step}, got None")
    lanes = _Lanes(source, split, positions.places, positions.turn)
    return Loader(DataLoader(lanes, batch_size=None, **worker_arguments(settings.workers)), positions)


class _Order:
    """What DataLoader takes as a sampler: the examples of each micro-batch, and the position behind it, which starts
    with ``identity``."""

    def __init__(self, split: Split, identity: dict[str, str], step: int, micro: int) -> None:
        self.split, self.identity, self.step, self.micro = split, identity, step, micro

    def __iter__(self) -> Iterator[tuple[range, dict[str, Any]]]:
        for number in count(self.step * self.split.accumulation + self.micro):
            examples = self.split.examples(*divmod(number, self.split.accumulation))
            step, micro = divmod(number + 1, self.split.accumulation)
            yield examples, {**self.identity, "step": step, "micro_batch": micro}


class _Rows(Dataset):
    """Makes a batch of the examples of a micro-batch, in a worker."""

    def __init__(self, source: RandomAccess) -> None:
        self.source = source

    def __getitem__(self, task: tuple[range, dict[str, Any]]) -> tuple[Batch, list[Skip]]:
        indices, position = task
        batch = collate([self.source.example(index) for index in indices], position)
        take_skips = getattr(self.source, "take_skips", None)
        return batch, take_skips() if take_skips else []


class _Lanes(IterableDataset):
    """Batches of one lane in each worker, which DataLoader asks in turn; ``turn`` is the first lane's number."""

    def __init__(self, source: ShardSource, split: Split, places: list[Place], turn: int) -> None:
        self.source, self.split, self.places, self.turn = source, split, places, turn

    def __iter__(self) -> Iterator[tuple[Batch, list[Skip]]]:
        worker = get_worker_info()
        own = len(self.places)
        lane = ((worker.id if worker else 0) + self.turn) % own
        lanes = own * self.split.world_size
        stream = self.source.examples(self.split.rank * own + lane, lanes, self.places[lane])
        while True:
            rows = list(islice(stream, self.split.rows))
            position = {"lane": lane, "place": rows[-1][1].to_json()}
            yield collate([example for example, _ in rows], position), self.source.take_skips()


class _Positions:
    """Turns the position that a worker gave a batch into one of the whole process; here they are the same."""

    def complete(self, batch: Batch) -> None:
        """Sets ``batch.position``."""


class _ShardPositions(_Positions):
    """Gathers the places of all lanes; ``turn`` is the lane whose batch is next."""

    def __init__(self, fingerprint: str, split: Split, lanes: int) -> None:
        self.identity = {"kind": "shards", "shards": fingerprint, "world_size": split.world_size, "rank": split.rank}
        self.places, self.turn = [Place()] * lanes, 0

    def load(self, position: dict[str, Any]) -> None:
        """Starts from what :meth:`complete` gave; ``ValueError`` if it is of other shards or another split."""
        for name, value in self.identity.items():
            if position.get(name) != value:
                raise ValueError(f"position has {name} {position.get(name)!r}, now it is {value!r}: it cannot continue")
        places, turn = position.get("places"), position.get("turn")
        if not isinstance(places, list) or type(turn) is not int or not 0 <= turn < max(1, len(places)):
            raise ValueError(f"position must have places and whose turn it is, got {position!r:.200}")
        if len(places) != len(self.places):
            raise ValueError(
                f"position is of a run with data.workers {len(places)}, now there are {len(self.places)}: with tar "
                f"shards the order depends on it"
            )
        self.places, self.turn = [Place.from_json(place) for place in places], turn

    def complete(self, batch: Batch) -> None:
        lane = batch.position["lane"]
        self.places = [*self.places]
        self.places[lane] = Place.from_json(batch.position["place"])
        self.turn = (lane + 1) % len(self.places)
        batch.position = {**self.identity, "turn": self.turn, "places": [place.to_json() for place in self.places]}


def collate(examples: Sequence[Example | CachedExample], position: dict[str, Any]) -> Batch:
    """A batch of examples of one kind and shape."""
    batch = Batch([example.key for example in examples], [example.caption for example in examples], position=position)
    if isinstance(examples[0], CachedExample):
        for name in examples[0].tensors:
            batch.cached[name] = torch.from_numpy(np.stack([example.tensors[name] for example in examples]))
    else:
        pixels = np.stack([example.image for example in examples])  # (B, H, W, 3)
        batch.images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return batch


@atexit.register  # before multiprocessing's own, which would wait for workers for ever
def _close_all() -> None:
    for loader in list(_open):
        loader.close()
