"""The order in which finite data is seen: every epoch a new permutation, a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

# First words of the random generators' keys, so that no two uses of one seed share their numbers.
ORDER, AUGMENTATION, SHARD_ORDER, SHARD_WINDOW, SHARD_AUGMENTATION = range(100, 105)


class EpochOrder:
    """Permutations of ``count`` things; place g of the endless stream is place g mod count of epoch g div count."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, number: int) -> np.ndarray:
        """(count,) int64: the permutation of an epoch. The last two are kept: a batch may straddle a boundary."""
        if number not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[number] = np.random.default_rng([ORDER, self.seed, number]).permutation(self.count)
        return self._epochs[number]

    def __getstate__(self) -> dict[str, int]:
        return {"count": self.count, "seed": self.seed}  # permutations are not sent to other processes

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)


def fingerprint(*what: str | int | Sequence[str]) -> str:
    """16 hexadecimal digits of what an order of examples depends on."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def augmentation(purpose: int, *key: int) -> np.random.Generator:
    """The generator for one picture's crop and flip. Philox starts without the cost of a large state."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([purpose, *key])))
