"""What the tests of float8 share: its numbers, and rounding to them without PyTorch's conversion."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
# the 127 numbers of e4m3 from 0 to 448, in order: those with an even mantissa have an even index
NUMBERS = torch.arange(127, dtype=torch.uint8).view(FLOAT8).double()
assert NUMBERS[0] == 0 and NUMBERS[1] == 2.0**-9 and NUMBERS[-1] == LARGEST and (NUMBERS.diff() > 0).all()


def nearest(x: Tensor) -> Tensor:
    """float64 numbers, at most 448 in size -> the nearest ones of e4m3 in float64, ties to even."""
    size = x.abs().clamp(max=LARGEST)
    above = torch.searchsorted(NUMBERS, size).clamp(max=len(NUMBERS) - 1)  # the first that is not smaller
    below = (above - 1).clamp(min=0)
    up, down = NUMBERS[above] - size, size - NUMBERS[below]
    index = torch.where(up < down, above, torch.where(down < up, below, torch.where(above % 2 == 0, above, below)))
    return torch.where(x < 0, -NUMBERS[index], NUMBERS[index])


def steps_off(values: Tensor, x: Tensor) -> Tensor:
    """How much further than the nearest number of e4m3 each of ``values`` is from x, relative to x."""
    x = x.double().cpu()
    apart, least = (values.double().cpu() - x).abs(), (nearest(x) - x).abs()
    return (apart - least) / x.abs().clamp(min=NUMBERS[1])
