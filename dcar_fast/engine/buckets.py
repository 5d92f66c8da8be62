"""Sizes for which graphs are captured; everything else is padded up to them or cut into them."""

from __future__ import annotations

from collections.abc import Sequence

BATCHES = (1, 2, 4, 8, 16)
LENGTHS = (32, 64, 128)  # tokens of the longest prompt; above them the longest that the model takes


def batch_bucket(batch: int) -> int:
    """The smallest captured batch that holds ``batch`` images, at most ``BATCHES[-1]``."""
    return next((size for size in BATCHES if size >= batch), BATCHES[-1])


def length_bucket(length: int, longest: int) -> int:
    """The captured text length that holds ``length`` tokens, for a model that takes ``longest``."""
    return next((size for size in LENGTHS if length <= size < longest), longest)


def parts(batch: int) -> list[slice]:
    """``batch`` images in pieces that fit a bucket: sixteen at a time."""
    return [slice(start, min(start + BATCHES[-1], batch)) for start in range(0, batch, BATCHES[-1])]


def check_sizes(name: str, sizes: Sequence[int], most: int) -> list[int]:
    """The sizes without repeats, the largest first; ``ValueError`` unless they are integers in 1..most."""
    if isinstance(sizes, int):
        sizes = [sizes]
    if not sizes or not all(type(size) is int and 1 <= size <= most for size in sizes):
        raise ValueError(f"{name} must be integers in 1..{most}, got {sizes!r}")
    return sorted(set(sizes), reverse=True)
