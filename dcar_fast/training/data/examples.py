"""What data sources give: examples, and batches of them with the position from which a resumed run continues."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One picture with its caption: key names it in messages, image is (H, W, 3) uint8 RGB."""

    key: str
    image: np.ndarray
    caption: str


@dataclass(frozen=True)
class CachedExample:
    """One picture as a cache of tokens keeps it. tensors: ``Batch.cached`` without its first axis."""

    key: str
    caption: str
    tensors: dict[str, np.ndarray]


@dataclass
class Batch:
    """One process's share of a micro-batch.

    images (B, 3, H, W) uint8, or None for cached data; captions and keys have B strings. cached: tensors of a cache by
    name ("ids" (B, h, w) int64, "residual" (B, N, C) float32, and for a frozen text encoder "text_states" (B, T, Dt)
    float16, "text_mask" (B, T) bool). position: JSON values; a loader that is given them continues right behind this
    batch. With tar shards every process has its own position.
    """

    keys: list[str]
    captions: list[str]
    images: Tensor | None = None
    cached: dict[str, Tensor] = field(default_factory=dict)
    position: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """Something that cannot be used. name: the file or example, reason: one of a few words, detail: what exactly."""

    name: str
    reason: str
    detail: str = ""


class BrokenExample(Exception):
    """An example that is to be left out. reason and detail as in :class:`Skip`."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason}: {detail}" if str(detail) else reason)
        self.reason, self.detail = reason, str(detail)


class RandomAccess(Protocol):
    """A source whose example at place ``index`` >= 0 of an endless stream is a pure function of (seed, index).

    A source that leaves out broken examples also has ``take_skips() -> list[Skip]``: those found since the last call.
    """

    def example(self, index: int) -> Example | CachedExample: ...
