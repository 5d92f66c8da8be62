"""Self-attention whose queries and keys are normalised over the full width, before they are split into heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.reference._attention import attention, attention_backward
from dcar_fast.reference._moments import combined


def self_attention(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    *,
    heads: int,
    eps: float = 1e-5,
    moments: Tensor | None = None,
) -> Tensor:
    """softmax(LN(q) LN(k)^T / sqrt(D / heads)) v per head, for [q | k | v] = qkv.

    qkv (B, N, 3D), weights and biases (D,) of an affine LayerNorm over all D -> (B, N, D) in qkv's dtype. Computed in
    float32, or in float64 if given float64. ``moments`` (B, N, 3D / 64, 2): mean and variance are taken from them.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(wide).chunk(3, dim=-1)  # each (B, N, D)
    of_q, of_k, _ = (None,) * 3 if moments is None else moments.to(wide).chunk(3, dim=2)
    q = _layer_norm(q, q_weight.to(wide), q_bias.to(wide), eps, of_q)
    k = _layer_norm(k, k_weight.to(wide), k_bias.to(wide), eps, of_k)
    q, k, v = (_split(x, heads) for x in (q, k, v))
    return attention(q, k, v).flatten(2).to(qkv.dtype)


def self_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    *,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of qkv, q_weight, q_bias, k_weight and k_bias from that of the output, each in its own type."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    qw, qb, kw, kb = (x.to(wide) for x in (q_weight, q_bias, k_weight, k_bias))
    q, k, v = qkv.to(wide).chunk(3, dim=-1)
    q, q_rstd = _standardise(q, eps)
    k, k_rstd = _standardise(k, eps)
    per_head = (_split(x, heads) for x in (grad.to(wide), q * qw + qb, k * kw + kb, v))
    grad_q, grad_k, grad_v = (x.flatten(2) for x in attention_backward(*per_head))
    parts = _unstandardise(grad_q * qw, q, q_rstd), _unstandardise(grad_k * kw, k, k_rstd), grad_v
    return (
        torch.cat(parts, dim=-1).to(qkv.dtype),
        (grad_q * q).sum(dim=(0, 1)).to(q_weight.dtype),
        grad_q.sum(dim=(0, 1)).to(q_bias.dtype),
        (grad_k * k).sum(dim=(0, 1)).to(k_weight.dtype),
        grad_k.sum(dim=(0, 1)).to(k_bias.dtype),
    )


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, moments: Tensor | None) -> Tensor:
    if moments is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    mean, rstd = combined(moments, x.shape[-1], eps)
    return (x - mean) * rstd * weight + bias


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))  # (B, N, D) -> (B, N, H, d)


def _standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) * rstd over the last dimension, and rstd."""
    x = x - x.mean(dim=-1, keepdim=True)
    rstd = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def _unstandardise(grad: Tensor, standard: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of x from that of what :func:`_standardise` made of it."""
    return rstd * (grad - grad.mean(-1, keepdim=True) - standard * (grad * standard).mean(-1, keepdim=True))
