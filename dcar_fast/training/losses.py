"""The generator's training loss: masked cross-entropy on the tokens, diffusion loss on the residuals.

The tokenizer's quantiser losses come with its tokens (:class:`dcar_fast.models.quantizer.Tokens`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.models._checks import check_tensor
from dcar_fast.models.diffusion_head import DiffusionHead
from dcar_fast.reference.diffusion import TRAINING_STEPS, diffusion_schedule

BIN = 1 / 255  # half a bin of the discretised likelihood at t = 0
EDGE = 0.999  # beyond it the bins reach to infinity


def random_token_mask(batch: int, tokens: int, generator: torch.Generator | None = None, device="cpu") -> Tensor:
    """(B, N) bool, True = MASK: max(1, round(N arccos(u) 2/pi)) random positions per row, u ~ U(0, 1), half to even."""
    u = torch.rand(batch, generator=generator, dtype=torch.float64, device=device)
    count = (tokens * torch.arccos(u) * 2 / math.pi).round().clamp(min=1)  # (B,)
    ranks = torch.rand(batch, tokens, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return ranks < count[:, None]


def token_loss(
    logits: Tensor,
    targets: Tensor,
    masked: Tensor,
    *,
    label_smoothing: float = 0.0,
    unmasked_weight: float = 0.0,
    total_weight: float | None = None,
) -> Tensor:
    """Mean cross-entropy over the masked positions; known ones count with ``unmasked_weight``.

    logits (B, N, V) float, targets (B, N) int64 code ids, masked (B, N) bool -> scalar float32. The recipe's values are
    label_smoothing 0.1 and unmasked_weight 0.1; the defaults are the plain masked loss. total_weight: what the weighted
    sum is divided by, by default the sum of these rows' weights; with :func:`token_weight` of a larger batch the losses
    of its parts add up to its mean.
    """
    check_tensor("targets", targets, tuple(logits.shape[:2]))
    check_tensor("masked", masked, tuple(logits.shape[:2]))
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(targets)
    weight = torch.where(masked, 1.0, unmasked_weight)
    return (loss * weight).sum() / (weight.sum() if total_weight is None else total_weight)


def token_weight(masked: Tensor, unmasked_weight: float = 0.0) -> float:
    """The sum of all positions' weights in :func:`token_loss`, masked (B, N) bool; waits for the device."""
    count = int(masked.sum())
    return count + unmasked_weight * (masked.numel() - count)


def diffusion_loss(
    head: DiffusionHead,
    hidden: Tensor,
    residual: Tensor,
    *,
    scale: float,
    multiplier: int = 4,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Loss of the diffusion head over all positions: mse(epsilon) + variational bound, scalar float32.

    hidden (B, N, Z) conditions, residual (B, N, C) targets, divided by ``scale`` (the residuals' standard deviation).
    Rows are repeated ``multiplier`` times as a whole (tiled), each with its own t uniform in 0..999 (unrespaced) and
    its own noise; timesteps (multiplier B N,) and noise (multiplier B N, C) may be given instead of drawn.
    """
    check_tensor("residual", residual, (*hidden.shape[:2], head.channels), floating=True)
    target = (residual.float() / scale).flatten(0, 1).repeat(multiplier, 1)  # (R, C)
    condition = hidden.flatten(0, 1).repeat(multiplier, 1)
    rows, device = len(target), target.device
    if timesteps is None:
        timesteps = torch.randint(TRAINING_STEPS, (rows,), generator=generator, device=device)
    if noise is None:
        noise = torch.randn(target.shape, generator=generator, device=device)
    check_tensor("timesteps", timesteps, (rows,))
    check_tensor("noise", noise, tuple(target.shape), floating=True)
    alpha_bar = _coefficient("alpha_bar", timesteps)
    x = alpha_bar.sqrt() * target + (1 - alpha_bar).sqrt() * noise
    epsilon, variance = head(x, timesteps, condition).float().chunk(2, dim=-1)
    bound = variational_bound(target, x, epsilon.detach(), variance, timesteps)
    return (F.mse_loss(epsilon, noise, reduction="none").mean(dim=1) + bound).mean()


def variational_bound(x0: Tensor, x: Tensor, epsilon: Tensor, variance: Tensor, timesteps: Tensor) -> Tensor:
    """One term of the variational bound per row, (R,), in bits per channel (Nichol & Dhariwal 2021, equation 15).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, the discretised likelihood of x_0 at t = 0; the predicted
    x_0 is not clamped.
    """
    from_x0, from_x = _coefficient("mean_from_x0", timesteps), _coefficient("mean_from_x", timesteps)
    true_mean = from_x0 * x0 + from_x * x
    predicted = _coefficient("x0_from_x", timesteps) * x - _coefficient("x0_from_epsilon", timesteps) * epsilon
    mean = from_x0 * predicted + from_x * x
    true_log = _coefficient("posterior_log_variance", timesteps)
    fraction = (variance + 1) / 2
    log_variance = fraction * _coefficient("log_beta", timesteps) + (1 - fraction) * true_log
    difference = true_log - log_variance
    kl = 0.5 * (difference.exp() - 1 - difference + (true_mean - mean).square() * torch.exp(-log_variance))
    likelihood = discretized_log_likelihood(x0, mean, 0.5 * log_variance)
    return torch.where(timesteps[:, None] == 0, -likelihood, kl).mean(dim=1) / math.log(2.0)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of a Gaussian's mass in the bin x +- 1/255, open beyond +-0.999; masses are at least 1e-12."""
    centred, inverse = x - mean, torch.exp(-log_std)
    upper, lower = _normal_cdf(inverse * (centred + BIN)), _normal_cdf(inverse * (centred - BIN))
    mass = torch.where(x < -EDGE, upper, torch.where(x > EDGE, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _coefficient(name: str, timesteps: Tensor) -> Tensor:
    """Column (R, 1) float32 of a coefficient of the 1000-step schedule at the rows' timesteps."""
    return _table(name, timesteps.device)[timesteps][:, None]


@lru_cache(maxsize=64)
def _table(name: str, device: torch.device) -> Tensor:
    """A coefficient of the schedule, (1000,) float32 on ``device``, computed in float64 and copied there once."""
    with torch.inference_mode(False):  # what lives longer than this call must take part in later gradients
        return torch.from_numpy(getattr(diffusion_schedule(), name)).float().to(device)
