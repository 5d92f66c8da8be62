"""What the ops on images (B, C, H, W) share: their checks, and the choice of a backend by type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcar_fast.kernels._layout import memory_format
from dcar_fast.ops._checks import check_same_device, check_tensor
from dcar_fast.ops._dispatch import Backend, choose, requested

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


def choose_for(op: str, x: Tensor, backend: str | None) -> Backend:
    """The implementation for ``x``. float64 is for the reference: "auto" takes it, a request for another is refused."""
    if x.dtype != torch.float64:
        return choose(op, x.device, backend)
    if (requested() if backend is None else backend) == "auto":
        return choose(op, x.device, "reference")
    asked = choose(op, x.device, backend)
    if asked.name != "reference":
        raise ValueError(f"backend is {asked.name!r}, which has no float64: allowed are 'auto' and 'reference'")
    return asked


def in_format_of(x: Tensor, result: Tensor) -> Tensor:
    """``result`` in the memory format that outputs made from ``x`` take."""
    return result.contiguous(memory_format=memory_format(x))
