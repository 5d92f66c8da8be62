"""A linear layer with what stands before it (LayerNorm or masked softmax) and after it (activation, residual)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.reference._moments import combined, row_moments

ACTIVATIONS = {"none": lambda y: y, "gelu": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    moments: Tensor | None = None,
    eps: float = 1e-6,
    lengths: Tensor | None = None,
    group: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    emit_moments: bool = False,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(f(x) W^T + bias) + residual (B, N, V), and its row moments if ``emit_moments``; see ``ops/fused_linear.py``.

    Computed in float32, or in float64 if given float64, and rounded once, to ``out_dtype`` or the type of ``weight``.
    With scales x and weight are multiplied by them first.
    """
    if x_scale is not None:
        x, weight = x.to(x_scale.dtype) * x_scale[..., None], weight.to(x_scale.dtype) * weight_scale[:, None]
    wide = torch.promote_types(weight.dtype, torch.float32)
    f = x.to(wide)
    if moments is not None:
        mean, rstd = combined(moments.to(wide), x.shape[-1], eps)
        f = (f - mean) * rstd
    if lengths is not None:
        f = masked_softmax(f, lengths, group)
    y = _product(f, weight.to(wide), None if bias is None else bias.to(wide))
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual
    y = y.to(out_dtype or weight.dtype)
    return (y, row_moments(y)) if emit_moments else y


def masked_softmax(scores: Tensor, lengths: Tensor, group: int) -> Tensor:
    """(B, N, H T) -> the same: softmax over the first lengths[b] columns of each group of T, 0 beyond them."""
    split = scores.unflatten(-1, (-1, group))  # (B, N, H, T)
    seen = torch.arange(group, device=scores.device) < lengths[:, None, None, None]  # (B, 1, 1, T)
    weights = split.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return weights.where(seen, 0.0).flatten(-2)  # a softmax over nothing is NaN


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, N, K) times weight (V, K), or image b times weight min(b, G - 1) of (G, V, K); bias (V,) or (G, V)."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    number = torch.arange(len(x), device=x.device).clamp(max=len(weight) - 1)
    y = x @ weight[number].transpose(1, 2)
    if bias is None:
        return y
    return y + (bias[number, None] if bias.dim() == 2 else bias)
