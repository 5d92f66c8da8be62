"""Tells which kernels Triton compiled, and which it found in its cache on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import triton


@contextmanager
def compilations() -> Iterator[list[bool]]:
    """Yields a list that gains an entry for each kernel made ready inside: whether it came from the cache."""
    found: list[bool] = []
    knobs = triton.knobs.compilation
    previous = knobs.listener

    def listen(*, cache_hit: bool, **details: object) -> None:
        found.append(cache_hit)
        if previous is not None:
            previous(cache_hit=cache_hit, **details)

    knobs.listener = listen
    try:
        yield found
    finally:
        knobs.listener = previous
