"""Fixed 2-D sin-cos position table (PixArt / MAE layout, base size 16)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BASE_SIZE = 16


@lru_cache(maxsize=64)
def sincos_positions(dim: int, height: int, width: int) -> Tensor:
    """Table (height * width, dim), float32 on the CPU, row-major; ``dim`` a multiple of 4.

    Coordinates are arange(n) / (n / 16) per axis, so every grid covers 0..16. The first dim/2 features encode the
    column, the last dim/2 the row, each [sin | cos] over dim/4 frequencies 10000^(-i / (dim/4)).
    """
    with torch.device("cpu"):
        quarter = dim // 4
        frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

        def axis(n: int) -> Tensor:
            coordinate = torch.arange(n, dtype=torch.float64) / (n / BASE_SIZE)
            angle = coordinate[:, None] * frequency  # (n, dim/4)
            return torch.cat((angle.sin(), angle.cos()), dim=-1)  # (n, dim/2)

        column = axis(width)[None].expand(height, -1, -1)
        row = axis(height)[:, None].expand(-1, width, -1)
        return torch.cat((column, row), dim=-1).reshape(height * width, dim).float()
