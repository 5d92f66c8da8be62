"""How the rows of a global batch are dealt out to processes and accumulated micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Split:
    """Cuts a global batch of ``batch_size`` rows: micro-batch m of process ``rank`` has ``rows`` rows, beginning with
    row (m ``world_size`` + ``rank``) ``rows``."""

    batch_size: int
    world_size: int = 1
    rank: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "world_size", "accumulation"):
            check_int(name, getattr(self, name), 1)
        check_int("rank", self.rank, 0)
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be below world_size {self.world_size}, got {self.rank}")
        if self.batch_size % (self.world_size * self.accumulation):
            raise ValueError(
                f"batch_size must be a multiple of {self.world_size} processes x {self.accumulation} accumulated "
                f"micro-batches, got {self.batch_size}"
            )

    @property
    def rows(self) -> int:
        """Rows of a micro-batch of one process."""
        return self.batch_size // (self.world_size * self.accumulation)

    def examples(self, step: int, micro: int) -> range:
        """Places of a micro-batch's rows in the endless stream of examples."""
        start = step * self.batch_size + (micro * self.world_size + self.rank) * self.rows
        return range(start, start + self.rows)


def check_int(name: str, value: Any, least: int) -> None:
    """``ValueError`` unless ``value`` is an integer >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
