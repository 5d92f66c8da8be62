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
        head(cond.float(), weight, bias),
        None if uncond is None else head(uncond.float(), weight, bias),
        guidance=guidance,
        softmax_temperature=softmax_temperature,
        tau=tau,
        noise=noise,
    )


def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """hidden (R, D) @ weight (V, D)^T + bias -> (R, V), codes with equal weights and bias giving equal logits.

    A matrix product may sum the columns beyond its last whole tile in another order, so that the lowest of equal codes
    loses its tie by the last bit. With V a multiple of 64 there are no such columns.
    """
    codes = weight.shape[0]
    missing = -codes % 64
    if missing:
        weight, bias = F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing))
    return F.linear(hidden, weight, bias)[:, :codes]
