"""Attention over a prefix of the keys, as long as each row's prompt."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the first ``lengths[b]`` keys of row b; no keys give zeros.

    q (B, N, H, d), k and v (B, T, H, d) of one float dtype, lengths (B,) int64 in 0..T -> (B, N, H, d) in that dtype.
    Computed in float32, or in float64 if given float64.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bnhd,bthd->bhnt", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    ignored = torch.arange(k.shape[1], device=q.device) >= lengths[:, None]  # (B, T)
    weights = scores.masked_fill(ignored[:, None, None], float("-inf")).softmax(dim=-1)
    weights = weights.masked_fill((lengths == 0)[:, None, None, None], 0.0)  # a softmax over nothing is NaN
    values = v.to(wide).masked_fill(ignored[:, :, None, None], 0.0)  # what is ignored may hold anything, NaN too
    return torch.einsum("bhnt,bthd->bnhd", weights, values).to(q.dtype)
