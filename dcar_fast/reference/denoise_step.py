"""One reverse diffusion step of the residual head: its network, guidance, posterior and noise.

The network is ``SimpleMLPAdaLN`` of Li et al., "Autoregressive Image Generation without Vector Quantization" (2024);
the posterior with a learned variance is Nichol & Dhariwal's, "Improved DDPM" (2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.reference.diffusion import Schedule

EPS = 1e-6  # of every LayerNorm
FORMULAS = ("c+s(c-u)", "u+s(c-u)")


class HeadWeights(NamedTuple):
    """The weights of one head as few tensors: width W, C channels, D blocks, condition of size Z. All of one dtype.

    A modulation is one row of D times (shift, scale, gate) and the final (shift, scale), each (W,).
    """

    time_in_weight: Tensor  # (W, 2F) for F frequencies
    time_in_bias: Tensor  # (W,)
    time_out_weight: Tensor  # (W, W)
    time_out_bias: Tensor  # (W,)
    condition_weight: Tensor  # (W, Z)
    condition_bias: Tensor  # (W,)
    modulation_weight: Tensor  # (3DW + 2W, W)
    modulation_bias: Tensor  # (3DW + 2W,)
    input_weight: Tensor  # (W, C)
    input_bias: Tensor  # (W,)
    norm_weight: Tensor  # (D, W)
    norm_bias: Tensor  # (D, W)
    hidden_weight: Tensor  # (D, W, W): the first linear of each block
    hidden_bias: Tensor  # (D, W)
    block_weight: Tensor  # (D, W, W): the second
    block_bias: Tensor  # (D, W)
    output_weight: Tensor  # (2C, W): epsilon, then the variance value
    output_bias: Tensor  # (2C,)

    @property
    def width(self) -> int:
        return self.input_weight.shape[0]

    @property
    def channels(self) -> int:
        return self.input_weight.shape[1]

    @property
    def depth(self) -> int:
        return self.hidden_weight.shape[0]


class Coefficients(NamedTuple):
    """What one step needs of its schedule: numbers, or tensors without dimensions. See :class:`Schedule`."""

    x0_from_x: float | Tensor
    x0_from_epsilon: float | Tensor
    mean_from_x0: float | Tensor
    mean_from_x: float | Tensor
    log_beta: float | Tensor
    posterior_log_variance: float | Tensor
    noisy: float | Tensor  # 0 in the last step (k = 0), which adds no noise, else 1
    timestep: float | Tensor  # which the network was fed


def coefficients(schedule: Schedule, k: int) -> Coefficients:
    """Those of step k, k = 0 being the last one, as floats."""
    return Coefficients(
        x0_from_x=float(schedule.x0_from_x[k]),
        x0_from_epsilon=float(schedule.x0_from_epsilon[k]),
        mean_from_x0=float(schedule.mean_from_x0[k]),
        mean_from_x=float(schedule.mean_from_x[k]),
        log_beta=float(schedule.log_beta[k]),
        posterior_log_variance=float(schedule.posterior_log_variance[k]),
        noisy=float(k > 0),
        timestep=float(schedule.timesteps[k]),
    )


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor, formula: str) -> Tensor:
    """Classifier-free guidance of epsilon: "c+s(c-u)" (DC-AR, HART) or "u+s(c-u)" (MAR and its relatives)."""
    if formula == "c+s(c-u)":
        return (1 + scale) * conditional - scale * unconditional
    if formula == "u+s(c-u)":
        return unconditional + scale * (conditional - unconditional)
    raise ValueError(f"formula must be 'c+s(c-u)' or 'u+s(c-u)', got {formula!r}")


def predict(x: Tensor, epsilon: Tensor, variance: Tensor, step: Coefficients, *, clip: bool) -> tuple[Tensor, Tensor]:
    """Mean and log variance (R, C) of x_{k-1} given x_k, in x's dtype.

    x_0 = x sqrt(1/abar) - epsilon sqrt(1/abar - 1), clamped to [-1, 1] if ``clip``; the mean is the posterior's.
    log var = f log beta + (1 - f) log posterior variance with f = (variance + 1) / 2 (learned range).
    """
    x0 = step.x0_from_x * x - step.x0_from_epsilon * epsilon
    if clip:
        x0 = x0.clamp(-1, 1)
    mean = step.mean_from_x0 * x0 + step.mean_from_x * x
    fraction = (variance + 1) / 2
    return mean, fraction * step.log_beta + (1 - fraction) * step.posterior_log_variance


def posterior_step(
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
    mean, log_variance = predict(x, epsilon, variance, coefficients(schedule, k), clip=clip)
    if k == 0:
        return mean
    return mean + temperature * torch.exp(0.5 * log_variance) * noise


def network(x: Tensor, modulation: Tensor, weights: HeadWeights) -> Tensor:
    """x_t (R, C) and modulations (R, 3DW + 2W) -> (R, 2C): epsilon and the variance value, in the weights' dtype.

    h = Linear(x_t); each block: h += gate * Linear(silu(Linear(LN(h) * (1 + scale) + shift))); the result is
    Linear(LN(h) * (1 + scale) + shift), where this last LN has no affine part.
    """
    width = (weights.width,)
    modulation = modulation.to(weights.input_weight.dtype)
    blocks, final = modulation.split((3 * weights.depth * weights.width, 2 * weights.width), dim=1)
    h = F.linear(x.to(weights.input_weight.dtype), weights.input_weight, weights.input_bias)  # (R, W)
    for i in range(weights.depth):
        shift, scale, gate = blocks[:, 3 * i * weights.width : 3 * (i + 1) * weights.width].chunk(3, dim=1)
        normed = F.layer_norm(h, width, weights.norm_weight[i], weights.norm_bias[i], EPS)
        hidden = F.silu(F.linear(normed * (1 + scale) + shift, weights.hidden_weight[i], weights.hidden_bias[i]))
        h = h + gate * F.linear(hidden, weights.block_weight[i], weights.block_bias[i])
    shift, scale = final.chunk(2, dim=1)
    normed = F.layer_norm(h, width, eps=EPS)
    return F.linear(normed * (1 + scale) + shift, weights.output_weight, weights.output_bias)


def denoise_step(
    x: Tensor,
    modulation: Tensor,
    weights: HeadWeights,
    step: Tensor,
    noise: Tensor,
    *,
    guidance: float | Tensor,
    temperature: float,
    formula: str,
    clip: bool,
) -> Tensor:
    """x_{k-1} from x_k (R, C), both in x's dtype: network, guidance, posterior, noise.

    modulation: (rows, 3DW + 2W). guidance 1, as a number: rows = R, all independent. Otherwise the first half of the
    rows is conditional, the second unconditional, and x holds the conditional half or both; both halves are fed the
    first half's x and share the guided epsilon, but each that is there keeps its own x, variance and noise.
    step: (8,), the fields of :class:`Coefficients`; where its ``noisy`` is 0 the noise (R, C) does not matter.
    """
    rows = len(modulation)
    guided = isinstance(guidance, Tensor) or guidance != 1.0
    fed = x[: rows // 2].repeat(2, 1) if guided else x
    epsilon, variance = network(fed, modulation, weights).to(x.dtype).chunk(2, dim=1)  # (rows, C) each
    if guided:
        epsilon = guide(epsilon[: rows // 2], epsilon[rows // 2 :], guidance, formula).repeat(2, 1)
    numbers = Coefficients(*step.to(x.dtype).unbind())
    mean, log_variance = predict(x, epsilon[: len(x)], variance[: len(x)], numbers, clip=clip)
    noisy = mean + temperature * torch.exp(0.5 * log_variance) * noise.to(x.dtype)
    return torch.where(numbers.noisy != 0, noisy, mean)
