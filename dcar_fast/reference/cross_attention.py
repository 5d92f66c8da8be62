"""Attention over a prefix of the keys, as long as each row's prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.reference._attention import attention, attention_backward


def cross_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the first ``lengths[b]`` keys of row b; no keys give zeros.

    q (B, N, H, d), k and v (B, T, H, d) of one float dtype, lengths (B,) int64 in 0..T -> (B, N, H, d) in that dtype.
    Computed in float32, or in float64 if given float64.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    return attention(q.to(wide), k.to(wide), v.to(wide), _ignored(k, lengths)).to(q.dtype)


def cross_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of the output, in its type and computed like it."""
    wide = torch.promote_types(q.dtype, torch.float32)
    found = attention_backward(grad.to(wide), q.to(wide), k.to(wide), v.to(wide), _ignored(k, lengths))
    grad_q, grad_k, grad_v = (x.to(q.dtype) for x in found)
    return grad_q, grad_k, grad_v


def _ignored(k: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(k.shape[1], device=k.device) >= lengths[:, None]  # (B, T)
