"""What follows a convolution: its bias, an activation, a residual."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.reference.activation import activate


def bias_residual(x: Tensor, bias: Tensor, *, residual: Tensor | None = None, activation: str = "none") -> Tensor:
    """residual + act(x + bias) with x and residual (B, C, H, W), bias (C,) -> (B, C, H, W), type of x.

    The activation is "none", "relu" or "silu". Computed in float32, float64 for float64, and rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = activate(x.to(wide) + bias.to(wide)[:, None, None], activation)
    return (out if residual is None else residual.to(wide) + out).to(x.dtype)
