"""What both sampling ops share: argument checks, and the noise as arguments that torch.library knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dcar_fast.noise import TokenNoise
from dcar_fast.ops._checks import (
    check_floating,
    check_int64,
    check_number,
    check_same_device,
    check_tensor,
    check_values,
)

KERNEL_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
LARGEST_WORD = 2**32 - 1  # tokens and steps are 32-bit words of the noise's counter


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
    check_number("guidance", guidance)
    check_number("softmax_temperature", softmax_temperature, 0.0, above=True)
    check_number("tau", tau, 0.0)


def check_noise(noise: Tensor | TokenNoise, cond: Tensor, size: int) -> None:
    """Uniforms (R, size) floating point, or a TokenNoise for R rows, on the device of ``cond``."""
    if isinstance(noise, TokenNoise):
        for name, value in (("noise.seeds", noise.seeds), ("noise.tokens", noise.tokens)):
            check_tensor(name, value, (cond.shape[0],))
            check_int64(name, value)
            check_same_device("cond", cond, name, value)
        if not isinstance(noise.step, int) or not 0 <= noise.step <= LARGEST_WORD:
            raise ValueError(f"noise.step is {noise.step!r}, allowed are 0..{LARGEST_WORD}")
        return
    check_tensor("noise", noise, (cond.shape[0], size))
    check_floating("noise", noise)
    check_same_device("cond", cond, "noise", noise)


class Draw(NamedTuple):
    """The noise of R rows: either uniforms (R, V), or seeds and tokens (R,) with a step."""

    uniforms: Tensor | None
    seeds: Tensor | None
    tokens: Tensor | None
    step: int

    @classmethod
    def of(cls, noise: Tensor | TokenNoise) -> Draw:
        if isinstance(noise, TokenNoise):
            return cls(None, noise.seeds, noise.tokens, noise.step)
        return cls(noise.detach(), None, None, 0)

    def noise(self) -> Tensor | TokenNoise:
        """As the public functions take it."""
        if self.uniforms is not None:
            return self.uniforms
        assert self.seeds is not None and self.tokens is not None
        return TokenNoise(self.seeds, self.tokens, self.step)

    def checked(self) -> Draw:
        """With float32 uniforms, after a look at the counters where they can be seen. For what runs, not for what is
        traced."""
        if self.uniforms is not None:
            return self._replace(uniforms=self.uniforms.float())
        assert self.seeds is not None and self.tokens is not None
        check_values("noise.seeds", self.seeds, 2**63 - 1)
        check_values("noise.tokens", self.tokens, LARGEST_WORD)
        return self

    def rows(self, start: int, stop: int) -> Draw:
        return Draw(*(None if x is None else x[start:stop] for x in self[:3]), self.step)


def for_kernels(x: Tensor | None) -> Tensor | None:
    """A type that the kernels read: float64 and float8 become float32."""
    return x if x is None or x.dtype in KERNEL_DTYPES else x.float()


def empty_choice(cond: Tensor) -> tuple[Tensor, Tensor]:
    """ids (R,) int64 and confidence (R,) float32, not filled."""
    return cond.new_empty(cond.shape[0], dtype=torch.int64), cond.new_empty(cond.shape[0], dtype=torch.float32)
