"""Argument checks that both sampling ops share."""

from __future__ import annotations

import math

from torch import Tensor

from dcar_fast.noise import TokenNoise
from dcar_fast.ops._checks import check_floating, check_int64, check_same_device, check_tensor


def check_rows(cond: Tensor, uncond: Tensor | None, columns: int | str) -> None:
    """cond (R, columns) floating point with at least one column, uncond the same or None."""
    check_tensor("cond", cond, ("R", columns))
    check_floating("cond", cond)
    if not cond.shape[1]:
        raise ValueError(f"cond has shape {tuple(cond.shape)}, allowed is at least one column")
    if uncond is not None:
        check_tensor("uncond", uncond, cond.shape)
        check_floating("uncond", uncond)
        check_same_device("cond", cond, "uncond", uncond)


def check_settings(guidance: float, softmax_temperature: float, tau: float) -> None:
    """guidance finite, softmax_temperature finite and > 0, tau finite and >= 0."""
    for name, value, ok, allowed in (
        ("guidance", guidance, lambda x: True, "a finite number"),
        ("softmax_temperature", softmax_temperature, lambda x: x > 0, "a finite number > 0"),
        ("tau", tau, lambda x: x >= 0, "a finite number >= 0"),
    ):
        if not isinstance(value, (int, float)) or not math.isfinite(value) or not ok(value):
            raise ValueError(f"{name} is {value!r}, allowed is {allowed}")


def check_noise(noise: Tensor | TokenNoise, cond: Tensor, size: int) -> None:
    """Uniforms (R, size) floating point, or a TokenNoise for R rows, on the device of ``cond``."""
    if isinstance(noise, TokenNoise):
        for name, value in (("noise.seeds", noise.seeds), ("noise.tokens", noise.tokens)):
            check_tensor(name, value, (cond.shape[0],))
            check_int64(name, value)
            check_same_device("cond", cond, name, value)
        return
    check_tensor("noise", noise, (cond.shape[0], size))
    check_floating("noise", noise)
    check_same_device("cond", cond, "noise", noise)
