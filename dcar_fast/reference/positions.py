"""Fixed 2-D sin-cos position table (PixArt / MAE layout, base size 16)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BASE_SIZE = 16


def sincos_positions(dim: int, height: int, width: int) -> Tensor:
    """Table (height * width, dim), float32 on the CPU, row-major; ``dim`` a multiple of 4. A new tensor every time.

    Coordinates are arange(n) / (n / 16) per axis, so every grid covers 0..16. The first dim/2 features encode the
    column, the last dim/2 the row, each [sin | cos] over dim/4 frequencies 10000^(-i / (dim/4)).
    """
    with torch.device("cpu"):
        return torch.from_numpy(_table(dim, height, width)).clone()


@lru_cache(maxsize=8)
def _table(dim: int, height: int, width: int) -> np.ndarray:
    quarter = dim // 4
    frequency = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)

    def axis(n: int) -> np.ndarray:
        angle = (np.arange(n, dtype=np.float64) / (n / BASE_SIZE))[:, None] * frequency  # (n, dim/4)
        return np.concatenate((np.sin(angle), np.cos(angle)), axis=-1)  # (n, dim/2)

    column = np.broadcast_to(axis(width)[None], (height, width, dim // 2))
    row = np.broadcast_to(axis(height)[:, None], (height, width, dim // 2))
    return np.concatenate((column, row), axis=-1).reshape(height * width, dim).astype(np.float32)
