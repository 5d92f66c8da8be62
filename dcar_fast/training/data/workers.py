"""The processes that decode: what signals do to them, and that none outlives the program."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

STOPS = (signal.SIGINT, signal.SIGTERM)


def worker_arguments(workers: int) -> dict[str, Any]:
    """Of DataLoader. With a generator of its own it leaves torch's global random state alone."""
    return {
        "num_workers": workers,
        "collate_fn": _as_is,
        "worker_init_fn": _start_worker,
        "generator": torch.Generator(),
    }


def _as_is(batch: Any) -> Any:
    return batch


@contextmanager
def signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM come after the block; workers that start in it have them blocked."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM to all processes, reach the workers too, but it is the main process that stops
    them, after its step. Should it die they end by themselves."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # commands that a worker starts inherit it
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """DataLoader's workers look for their parent too, but not while they decode, nor while a pipe is full."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def kill(workers: Sequence[Any]) -> None:
    """Those that hang: DataLoader sends SIGTERM, which they do not heed."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
