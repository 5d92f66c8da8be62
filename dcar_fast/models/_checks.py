"""Argument checks that name the argument, what came and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(
    name: str, value: Tensor, shape: tuple[int | None, ...], *, floating: bool = False, empty: bool = True
) -> None:
    """``ValueError`` unless ``value`` is a tensor of this shape (None: any size), and what else is asked of it."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    wanted = "(" + ", ".join("*" if n is None else str(n) for n in shape) + ")"
    fits = value.dim() == len(shape) and all(n is None or n == m for n, m in zip(shape, value.shape, strict=True))
    if not fits:
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if not empty and not value.numel():
        raise ValueError(f"{name} must not be empty, got shape {tuple(value.shape)}")
    if floating and not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")


def check_ids(name: str, ids: Tensor, shape: tuple[int | None, ...], end: int, *, empty: bool = True) -> None:
    """``ValueError`` unless ``ids`` is int64 of this shape with values in 0..end-1.

    The values are looked at on the CPU only: on a GPU that would wait for the device, and the embedding's own device
    assertion catches them.
    """
    check_tensor(name, ids, shape, empty=empty)
    if ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {ids.dtype}")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= end:
            raise ValueError(f"{name} must lie in 0..{end - 1}, got values in {low}..{high}")
