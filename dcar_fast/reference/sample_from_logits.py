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
    ``noise`` holds uniforms (R, V) or is a TokenNoise for the R rows. NaN logits count as -inf; a row without any
    logit above -inf gives id 0 and confidence -inf.
    """
    logits = cond.float()
    if uncond is not None:
        logits = logits + guidance * (logits - uncond.float())
    logits = logits / softmax_temperature
    logits = logits.masked_fill(logits.isnan(), float("-inf"))
    uniforms = noise.uniform(logits.shape[-1]) if isinstance(noise, TokenNoise) else noise.float()
    ids = (logits + tau * gumbel(uniforms)).argmax(dim=-1)  # (R,)
    confidence = logits.gather(-1, ids[:, None])[:, 0]
    return ids.masked_fill(confidence == float("-inf"), 0), confidence
