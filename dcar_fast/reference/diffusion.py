"""The diffusion schedule of the residual head: 1000 cosine steps, respaced, in float64; and how a timestep is embedded.

Source: Nichol & Dhariwal, "Improved DDPM" (2021), as the MAR family uses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

TRAINING_STEPS = 1000
FREQUENCIES = 128  # of the timestep embedding


def cosine_betas(steps: int = TRAINING_STEPS) -> np.ndarray:
    """beta_i = min(1 - ab((i+1)/n) / ab(i/n), 0.999), ab(t) = cos^2((t + 0.008) / 1.008 * pi/2). (n,) float64."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)])


def kept_timesteps(spec: int | str, steps: int = TRAINING_STEPS) -> tuple[int, ...]:
    """The original timesteps that a respaced schedule keeps, ascending.

    ``spec`` is a number of steps, or a comma list of steps per equal section ("10,0": ten in the first half). Within a
    section the timesteps are a running float64 sum of (size-1)/(count-1) from its start, each rounded half to even;
    the running sum matters: 21 steps keep 499, not 500.
    """
    counts = [int(part) for part in str(spec).split(",")]
    size, extra = divmod(steps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise ValueError(f"head_steps: section {section} of {spec!r} asks for {count} of {length} timesteps")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    if not kept:
        raise ValueError(f"head_steps: {spec!r} keeps no timestep")
    return tuple(kept)


def timestep_embedding(timesteps: Tensor) -> Tensor:
    """(R,) -> (R, 256) float32: [cos | sin] of t * 10000^(-i/128), i < 128."""
    exponent = -math.log(10000.0) * torch.arange(FREQUENCIES, dtype=torch.float32, device=timesteps.device)
    angle = timesteps.float()[:, None] * torch.exp(exponent / FREQUENCIES)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Coefficients per kept step k (ascending noise), each (K,) float64; cast where they are used.

    timesteps: the original timesteps, which the network is fed. log_beta and posterior_log_variance bound the learned
    log variance; entry 0 of the latter is replaced by entry 1 (it would be log 0).
    """

    timesteps: tuple[int, ...]
    alpha_bar: np.ndarray
    x0_from_x: np.ndarray  # sqrt(1 / abar)
    x0_from_epsilon: np.ndarray  # sqrt(1 / abar - 1)
    mean_from_x0: np.ndarray  # beta sqrt(abar_prev) / (1 - abar)
    mean_from_x: np.ndarray  # (1 - abar_prev) sqrt(alpha) / (1 - abar)
    log_beta: np.ndarray
    posterior_log_variance: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


@lru_cache(maxsize=64)
def diffusion_schedule(spec: int | str = TRAINING_STEPS) -> Schedule:
    """The cosine schedule respaced to ``spec`` (see :func:`kept_timesteps`); the default keeps all 1000 steps."""
    timesteps, beta = kept_timesteps(spec), cosine_betas()
    if len(timesteps) < TRAINING_STEPS:
        alpha_bar = np.cumprod(1.0 - beta)[list(timesteps)]
        beta = 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return schedule_of(timesteps, beta)


def schedule_of(timesteps: tuple[int, ...], beta: np.ndarray) -> Schedule:
    """The schedule whose K steps have these (respaced) betas, (K,) float64, and feed these timesteps to the network."""
    alpha_bar = np.cumprod(1.0 - beta)
    previous = np.append(1.0, alpha_bar[:-1])
    variance = beta * (1.0 - previous) / (1.0 - alpha_bar)
    variance[0] = variance[1] if len(variance) > 1 else beta[0]
    return Schedule(
        timesteps=timesteps,
        alpha_bar=alpha_bar,
        x0_from_x=np.sqrt(1.0 / alpha_bar),
        x0_from_epsilon=np.sqrt(1.0 / alpha_bar - 1.0),
        mean_from_x0=beta * np.sqrt(previous) / (1.0 - alpha_bar),
        mean_from_x=(1.0 - previous) * np.sqrt(1.0 - beta) / (1.0 - alpha_bar),
        log_beta=np.log(beta),
        posterior_log_variance=np.log(variance),
    )
