"""Argument checks of the ops: every ValueError names the argument, what came and what is allowed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch


def check_tensor(name: str, value: object, shape: Sequence[int | str]) -> None:
    """``value`` must be a tensor of this shape; a string in ``shape`` stands for any size and is its name."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, allowed is a tensor {_text(shape)}")
    fits = value.dim() == len(shape)
    for want, size in zip(shape, value.shape, strict=False):  # a loop: this runs on every call, a generator is slower
        fits = fits and (isinstance(want, str) or want == size)
    if not fits:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, allowed is {_text(shape)}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} is {value.layout}, allowed is torch.strided: use to_dense()")


def _text(shape: Sequence[int | str]) -> str:
    """ "(B, 3)". Formed for an error only: torch.compile cannot write out a size that it keeps symbolic."""
    return f"({', '.join(map(str, shape))})"


def check_number(name: str, value: object, least: float = -math.inf, *, above: bool = False) -> None:
    """A finite number that a float holds, at least ``least``, or ``above`` it. Plain comparisons, which torch.compile
    traces for numbers that change."""
    largest = sys.float_info.max
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest
    if not fits or value < least or (above and value == least):
        bound = "" if least == -math.inf else f" {'>' if above else '>='} {least:g}"
        raise ValueError(f"{name} is {value!r}, allowed is a finite number{bound}")


def check_floating(name: str, value: torch.Tensor) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}, allowed are floating-point types")


def check_codebook(codebook: object, channels: int | str = "C") -> None:
    """(V, C) with at least one code of at least one channel, floating point."""
    check_tensor("codebook", codebook, ("V", channels))
    assert isinstance(codebook, torch.Tensor)
    check_floating("codebook", codebook)
    if 0 in codebook.shape:
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}, allowed is (V, C) with V and C at least 1")


def check_same_device(first: str, one: torch.Tensor, second: str, other: torch.Tensor) -> None:
    if one.device != other.device:
        raise ValueError(f"{second} is on {other.device}, allowed is the device of {first}, {one.device}")


def check_moments(name: str, origin: str, moments: object, x: torch.Tensor, pieces: int) -> None:
    """Row moments (B, N, pieces, 2) of x (B, N, .), which is called ``origin``: float32, or float64 with float64."""
    check_tensor(name, moments, (*x.shape[:2], pieces, 2))
    assert isinstance(moments, torch.Tensor)
    wide = torch.promote_types(x.dtype, torch.float32)
    if moments.dtype != wide:
        raise ValueError(f"{name} is {moments.dtype}, allowed is {wide}")
    check_same_device(origin, x, name, moments)


def check_int64(name: str, value: torch.Tensor) -> None:
    if value.dtype != torch.int64:
        raise ValueError(f"{name} is {value.dtype}, allowed is torch.int64")


def check_values(name: str, value: torch.Tensor, high: int) -> None:
    """All in 0..high, where that can be seen without waiting for a GPU. For what runs, not for what is traced."""
    if value.device.type == "cpu" and value.numel():
        least, most = (bound.item() for bound in value.aminmax())
        if least < 0 or most > high:
            raise ValueError(f"{name} has values in {least}..{most}, allowed are 0..{high}")


def check_no_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """For ops that are inference-only: while gradients are recorded, no input may ask for one."""
    for name, value in tensors.items():
        if torch.is_grad_enabled() and value is not None and value.requires_grad:
            raise ValueError(f"{name} requires a gradient, which {op} does not have: detach it or use no_grad")
