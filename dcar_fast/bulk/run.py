"""Drawing a list of jobs in batches of about equal prompts, writing while the next batch is drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dcar_fast._progress import ImageBar
from dcar_fast.bulk.folder import ImageFolder
from dcar_fast.bulk.jobs import Job
from dcar_fast.bulk.ranks import Rank

WRITERS = 4  # threads; compressing a PNG takes one of them about as long as a GPU needs for the image

# prompts, seeds, progress(stage, done, total) -> images
Draw = Callable[[Sequence[str], Sequence[int], Callable[[str, int, int], None]], list[Image.Image]]


@dataclass(frozen=True)
class Report:
    """What this process did: ``made`` new images of its ``share`` of all ``total`` ones, in ``seconds``.

    complete: the images of all processes are there and metadata.jsonl lists them.
    """

    folder: Path
    rank: Rank
    total: int
    share: int
    made: int
    seconds: float
    complete: bool

    @property
    def found(self) -> int:
        """Images of the share that were there already."""
        return self.share - self.made

    @property
    def images_per_second(self) -> float:
        return self.made / self.seconds if self.made else 0.0

    def __str__(self) -> str:
        who = f"rank {self.rank.index} of {self.rank.count}: " if self.rank.count > 1 else ""
        there = f", {self.found} were there" if self.found else ""
        speed = f" in {self.seconds:.1f} s ({self.images_per_second:.2f} images/s)" if self.made else ""
        rest = "" if self.complete else "; the images of other ranks are not all there yet"
        return f"{who}wrote {self.made} images to {self.folder}{speed}{there}{rest}"


def draw_all(
    jobs: Sequence[Job],
    folder: ImageFolder,
    draw: Draw,
    count_tokens: Callable[[Sequence[str]], list[int]],
    *,
    batch_size: int,
    overwrite: bool,
    rank: Rank,
    progress: bool,
) -> Report:
    """Draws this rank's share of the jobs, longest prompts first: what runs out of memory does so at once.

    Who draws what depends on the jobs and ``rank.count`` alone, so the ranks need not agree on anything. Each one looks
    for all files when it is done; the last one finds them and writes the metadata.
    """
    for job in jobs:
        folder.has(job, others=overwrite)  # what is in the way shows before any work
    lengths = count_tokens([job.prompt for job in jobs])
    order = sorted(range(len(jobs)), key=lambda i: (-lengths[i], i))
    share = [jobs[i] for i in rank.share(order)]
    pending = [job for job in share if overwrite or not folder.has(job, whole=True)]
    start = time.perf_counter()
    title = f"rank {rank.index} of {rank.count}" if rank.count > 1 else ""
    with (
        ImageBar(progress and bool(pending) and rank.index == 0, len(pending), title) as bar,
        _Writers(folder) as writers,
    ):
        for first in range(0, len(pending), batch_size):
            batch = pending[first : first + batch_size]
            images = draw([job.prompt for job in batch], [job.seed for job in batch], bar.step)
            writers.put(images, batch)
            bar.drawn(len(batch))
        writers.wait()
    seconds = time.perf_counter() - start
    complete = folder.write_metadata(jobs)
    return Report(folder.path, rank, len(jobs), len(share), len(pending), seconds, complete)


class _Writers:
    """Threads that write one batch while the next one is drawn; what was given to them is written, come what may."""

    def __init__(self, folder: ImageFolder) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="png")
        self._running: list[Future[None]] = []

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(wait=True)

    def put(self, images: Sequence[Image.Image], jobs: Sequence[Job]) -> None:
        """Waits for the batch before, so that never more than two are in memory."""
        self.wait()
        self._running = [self._pool.submit(self._folder.write, *pair) for pair in zip(images, jobs, strict=True)]

    def wait(self) -> None:
        """Raises what went wrong in a thread."""
        for future in self._running:
            future.result()
        self._running = []


def check_batch_size(batch_size: int) -> None:
    """``ValueError`` unless it is a positive integer."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
