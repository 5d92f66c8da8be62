"""Depthwise 3x3 convolution with the activation before it and the gate behind it: the middle of GLUMBConv."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.reference.activation import activate


def depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str = "silu") -> Tensor:
    """(B, C, H, W) from x (B, 2C, H, W), weight (2C, 1, 3, 3) and bias (2C,), type of x.

    y = depthwise convolution of act(x), padding 1; out = y[:, :C] * act(y[:, C:]). act is "relu" or "silu". Computed in
    float32, float64 for float64, and rounded once.
    """
    if x.numel() == 0:  # a convolution of an image without pixels is an error
        return x[:, : x.shape[1] // 2].clone()
    wide = torch.promote_types(x.dtype, torch.float32)
    inner = activate(x.to(wide), activation)
    y = F.conv2d(inner, weight.to(wide), bias.to(wide), padding=1, groups=x.shape[1])
    value, gate = y.chunk(2, dim=1)
    return (value * activate(gate, activation)).to(x.dtype)
