"""LayerNorm or RMSNorm over the channels of each pixel, with activation and residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.reference.activation import activate


def channel_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    centred: bool = True,
) -> Tensor:
    """residual + act(norm(x)) with x and residual (B, C, H, W), weight and bias (C,) -> (B, C, H, W), type of x.

    At each pixel the C channels lose their mean, are divided by sqrt(variance + eps) (variance without Bessel's
    correction) and go through weight and bias; then the activation: "none", "relu" or "silu". Not ``centred`` (RMSNorm)
    they keep their mean and are divided by sqrt(mean of squares + eps). Computed in float32, float64 for float64, and
    rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pixels = x.permute(0, 2, 3, 1).to(wide)  # (B, H, W, C)
    if centred:
        out = F.layer_norm(pixels, pixels.shape[-1:], weight.to(wide), bias.to(wide), eps)
    else:
        out = F.rms_norm(pixels, pixels.shape[-1:], weight.to(wide), eps) + bias.to(wide)
    out = activate(out.permute(0, 3, 1, 2), activation)
    return (out if residual is None else residual.to(wide) + out).to(x.dtype)
