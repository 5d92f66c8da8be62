"""The logits head and the sampling of one token per row in one formula."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dcar_fast.noise import TokenNoise
from dcar_fast.reference.sample_from_logits import sample_from_logits


def sample_tokens(
    cond: Tensor,
    uncond: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    guidance: float,
    softmax_temperature: float,
    tau: float,
    noise: Tensor | TokenNoise,
) -> tuple[Tensor, Tensor]:
    """ids (R,) int64 and confidence (R,) float32 from normed hidden states cond and uncond (R, D).

    logits = hidden @ weight (V, D)^T + bias (V,) of each branch, in float32; the rest is
    :func:`dcar_fast.reference.sample_from_logits.sample_from_logits`.
    """
    weight, bias = weight.float(), bias.float()
    return sample_from_logits(
        F.linear(cond.float(), weight, bias),
        None if uncond is None else F.linear(uncond.float(), weight, bias),
        guidance=guidance,
        softmax_temperature=softmax_temperature,
        tau=tau,
        noise=noise,
    )
