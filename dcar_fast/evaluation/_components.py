"""Connected components and growing of masks, in numpy alone."""

from __future__ import annotations

import numpy as np


def label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected components (four neighbours) of a (H, W) bool mask: (H, W) int64 labels, 0 outside, 1.. in reading
    order, and their number.

    Every row is cut into runs; a run is joined with the runs above that share a column with it (union-find).
    """
    runs: list[tuple[int, int, int]] = []  # row, first column, one past the last
    parent: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above: list[int] = []
    for row, line in enumerate(mask):
        steps = np.diff(np.concatenate(([0], line.astype(np.int8), [0])))
        here = []
        for start, end in zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True):
            this = len(runs)
            runs.append((row, start, end))
            parent.append(this)
            here.append(this)
            for other in above:
                if runs[other][1] < end and start < runs[other][2]:
                    a, b = root(other), root(this)
                    parent[max(a, b)] = min(a, b)
        above = here
    labels = np.zeros(mask.shape, dtype=np.int64)
    numbers: dict[int, int] = {}
    for i, (row, start, end) in enumerate(runs):
        labels[row, start:end] = numbers.setdefault(root(i), len(numbers) + 1)
    return labels, len(numbers)


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask and everything within ``pixels`` steps to one of the eight neighbours."""
    for axis in (0, 1):
        grown = mask.copy()
        for shift in range(1, pixels + 1):
            before, after = [slice(None)] * 2, [slice(None)] * 2
            before[axis], after[axis] = slice(shift, None), slice(None, -shift)
            grown[tuple(before)] |= mask[tuple(after)]
            grown[tuple(after)] |= mask[tuple(before)]
        mask = grown
    return mask


def shrink(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The pixels whose neighbourhood lies in the mask; beyond the border everything does."""
    return ~grow(~mask, pixels)
