"""What the ops on images (B, C, H, W) share: their checks, and the choice of a backend by type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcar_fast.kernels._layout import memory_format
from dcar_fast.ops._checks import check_same_device, check_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_real(name: str, value: object, shape: Sequence[int | str]) -> None:
    """A tensor of this shape in one of the types that the ops take."""
    check_tensor(name, value, shape)
    assert isinstance(value, Tensor)
    if value.dtype not in DTYPES:
        raise ValueError(f"{name} is {value.dtype}, allowed are {', '.join(map(str, DTYPES))}")


def check_like(first: str, one: Tensor, second: str, other: Tensor) -> None:
    """``second`` must have device and type of ``first``."""
    check_same_device(first, one, second, other)
    if other.dtype != one.dtype:
        raise ValueError(f"{second} is {other.dtype}, allowed is the type of {first}, {one.dtype}")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(map(repr, allowed))}")


def in_format_of(x: Tensor, result: Tensor) -> Tensor:
    """``result`` in the memory format that outputs made from ``x`` take."""
    return result.contiguous(memory_format=memory_format(x))
