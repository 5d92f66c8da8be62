"""This process among those of ``torchrun`` or ``accelerate launch``. They never talk to each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Rank:
    """Process ``index`` of ``count``; ``local`` is its number on this machine."""

    index: int = 0
    count: int = 1
    local: int = 0

    def __post_init__(self) -> None:
        for value in (self.index, self.count, self.local):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"rank must consist of integers, got {self}")
        if not 0 <= self.index < self.count or self.local < 0:
            raise ValueError(f"rank: index must be 0..count - 1 and local >= 0, got {self}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """RANK, WORLD_SIZE and LOCAL_RANK; without WORLD_SIZE the only process. ``ValueError`` for half of them."""
        if "WORLD_SIZE" not in environment:
            return cls()
        values = []
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            try:
                values.append(int(environment[name]))
            except (KeyError, ValueError):
                got = environment.get(name)
                raise ValueError(f"WORLD_SIZE is set, so {name} must be an integer, got {got!r}") from None
        return cls(*values)

    def device(self, name: str, gpu: bool) -> str:
        """The device for ``name``; "cuda" (or "auto", where there is a GPU) is among several ranks GPU ``local``."""
        if name == "auto":
            name = "cuda" if gpu else "cpu"
        return f"cuda:{self.local}" if name == "cuda" and self.count > 1 else name

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of items sorted by cost: dealt back and forth, so that numbers and costs are balanced."""
        dealt = (list(items[start : start + self.count]) for start in range(0, len(items), self.count))
        slots = (self.index if turn % 2 == 0 else self.count - 1 - self.index for turn in range(len(items)))
        return [hand[slot] for hand, slot in zip(dealt, slots, strict=False) if slot < len(hand)]
