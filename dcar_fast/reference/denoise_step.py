"""One reverse diffusion step of the residual head, after its network has run."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.reference.diffusion import Schedule


def guide(conditional: Tensor, unconditional: Tensor, scale: float, formula: str) -> Tensor:
    """Classifier-free guidance of epsilon: "c+s(c-u)" (DC-AR, HART) or "u+s(c-u)" (MAR and its relatives)."""
    if formula == "c+s(c-u)":
        return (1 + scale) * conditional - scale * unconditional
    if formula == "u+s(c-u)":
        return unconditional + scale * (conditional - unconditional)
    raise ValueError(f"formula must be 'c+s(c-u)' or 'u+s(c-u)', got {formula!r}")


def predict(
    x: Tensor, epsilon: Tensor, variance: Tensor, schedule: Schedule, k: int, *, clip: bool
) -> tuple[Tensor, Tensor]:
    """Mean and log variance (R, C) of x_{k-1} given x_k, in x's dtype.

    x_0 = x sqrt(1/abar) - epsilon sqrt(1/abar - 1), clamped to [-1, 1] if ``clip``; the mean is the posterior's.
    log var = f log beta + (1 - f) log posterior variance with f = (variance + 1) / 2 (learned range).
    """
    x0 = float(schedule.x0_from_x[k]) * x - float(schedule.x0_from_epsilon[k]) * epsilon
    if clip:
        x0 = x0.clamp(-1, 1)
    mean = float(schedule.mean_from_x0[k]) * x0 + float(schedule.mean_from_x[k]) * x
    fraction = (variance + 1) / 2
    upper, lower = float(schedule.log_beta[k]), float(schedule.posterior_log_variance[k])
    return mean, fraction * upper + (1 - fraction) * lower


def denoise_step(
    x: Tensor,
    epsilon: Tensor,
    variance: Tensor,
    noise: Tensor,
    schedule: Schedule,
    k: int,
    *,
    temperature: float = 1.0,
    clip: bool = True,
) -> Tensor:
    """x_{k-1} (R, C) from x_k (R, C): mean + temperature * exp(log var / 2) * noise; no noise at k = 0.

    epsilon is already guided; variance is the network's variance value v; noise is standard normal (R, C).
    """
    mean, log_variance = predict(x, epsilon, variance, schedule, k, clip=clip)
    if k == 0:
        return mean
    return mean + temperature * torch.exp(0.5 * log_variance) * noise
