"""Guided, annealed Gumbel-max sampling of one token per row, and the confidence in it."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.noise import TokenNoise


def gumbel(u: Tensor) -> Tensor:
    """-log(-log u), both logs clamped at 1e-20 because recorded uniforms may be exactly 0 or 1."""
    return -torch.log((-torch.log(u.clamp(min=1e-20))).clamp(min=1e-20))


def sample_from_logits(
    cond: Tensor,
    uncond: Tensor | None,
    *,
    guidance: float,
    softmax_temperature: float,
    tau: float,
    noise: Tensor | TokenNoise,
) -> tuple[Tensor, Tensor]:
    """ids (R,) int64 and confidence (R,) float32 from logits ``cond`` and ``uncond`` (R, V), computed in float32.

    logits = (c + guidance (c - u)) / softmax_temperature (without ``uncond``: c / softmax_temperature);
    id = argmax(logits + tau * gumbel(noise)), the lowest on ties; confidence = the id's logit, without noise.
    ``noise`` holds uniforms (R, V) or is a TokenNoise for the R rows. NaN, in a logit or a sum, counts as -inf; a row
    without any sum above -inf gives id 0 and confidence -inf.
    """
    logits = cond.float()
    if uncond is not None:
        logits = logits + guidance * (logits - uncond.float())
    logits = logits / softmax_temperature
    logits = logits.masked_fill(logits.isnan(), float("-inf"))
    uniforms = noise.uniform(logits.shape[-1]) if isinstance(noise, TokenNoise) else noise.float()
    scores = logits + tau * gumbel(uniforms)
    best, ids = scores.masked_fill(scores.isnan(), float("-inf")).max(dim=-1)  # (R,)
    confidence = logits.gather(-1, ids[:, None])[:, 0]
    nothing = best == float("-inf")
    return ids.masked_fill(nothing, 0), confidence.masked_fill(nothing, float("-inf"))
