"""What changes from step to step: guidance, annealing, temperature, and how many tokens stay masked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dcar_fast.config import SamplingConfig


@dataclass(frozen=True)
class Step:
    """Unmasking step ``index`` of the plan.

    guidance: g in logits = c + g (c - u), None where no unconditional pass is needed for the logits.
    softmax_temperature divides the logits; tau scales the Gumbel noise of tokens and confidences.
    """

    index: int
    guidance: float | None
    softmax_temperature: float
    tau: float


def guidance_weight(config: SamplingConfig, step: int) -> float | None:
    """g of :class:`Step`. With w the schedule's scale at ``step`` of S:

    constant: c + w (c - u), w = scale; linear: the same, w = scale * step / S; power-cosine: u + w (c - u), which is
    g = w - 1, w = (scale - 1) (1 - cos(pi (step/S)^p)) / 2 + 1. Scale 0 means no guidance (constant, linear).
    """
    scale, fraction = config.guidance_scale, step / config.num_steps
    if config.guidance_schedule == "power-cosine":
        return power_cosine(scale, fraction, config.guidance_power) - 1
    weight = scale if config.guidance_schedule == "constant" else scale * fraction
    return weight or None


def power_cosine(scale: float, fraction: float, power: float) -> float:
    """(scale - 1) (1 - cos(pi fraction^power)) / 2 + 1."""
    return (scale - 1) * (1 - math.cos(math.pi * fraction**power)) / 2 + 1


def head_guidance(config: SamplingConfig) -> float:
    """s of the diffusion head's guided epsilon, (1 + s) c - s u; 1 (and 0) run the conditional rows alone.

    The released sampler hands the head the plain scale (constant, linear) or the last step's w (power-cosine), and the
    head takes s == 1 for "no guidance": guidance scale 1 therefore guides the logits but not the residuals.
    """
    if config.guidance_schedule == "power-cosine":
        last = (config.num_steps - 1) / config.num_steps
        return power_cosine(config.guidance_scale, last, config.guidance_power)
    return config.guidance_scale or 1.0


def plan(config: SamplingConfig) -> list[Step]:
    """The steps s = 0..S-1, with r = (s+1)/S: softmax temperature 0.5 + 0.8 (1 - r), tau = temperature (1 - r)."""
    steps = []
    for s in range(config.num_steps):
        left = 1 - (s + 1) / config.num_steps
        annealed = 0.5 + 0.8 * left if config.anneal_softmax else 1.0
        steps.append(Step(s, guidance_weight(config, s), annealed, config.temperature * left))
    return steps


def masked_counts(config: SamplingConfig, num_tokens: int) -> np.ndarray:
    """Table (S, N + 1) int64: how many tokens stay masked after step s in an image that starts with k open ones.

    n = max(1, min(masked now - 1, floor(T arccos(r) 2/pi))) in float64, T = k (``schedule_tokens="open"``) or N
    ("all"); 0 after the last step and for k = 0. For 256 open tokens and 12 steps: 242 228 214 200 185 170 154 137 117
    95 67 0.
    """
    open_tokens = np.arange(num_tokens + 1)
    total = open_tokens if config.schedule_tokens == "open" else np.full_like(open_tokens, num_tokens)
    table = np.zeros((config.num_steps, num_tokens + 1), dtype=np.int64)
    masked = open_tokens
    for s in range(config.num_steps - 1):
        ratio = (s + 1) / config.num_steps
        cosine = np.floor(total * math.acos(ratio) * 2 / math.pi).astype(np.int64)
        masked = np.where(open_tokens > 0, np.maximum(1, np.minimum(masked - 1, cosine)), 0)
        table[s] = masked
    return table
