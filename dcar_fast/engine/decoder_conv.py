"""Convolutions laid out once for the device that runs them, with what follows them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.reference.activation import ACTIVATIONS


class Conv:
    """act(conv(x) + bias), or conv(x) + bias + residual; channels last; "same" padding, stride 1.

    A BatchNorm behind the convolution is folded into its weight and bias, in float32 or better, before rounding.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, norm: nn.BatchNorm2d | None = None) -> None:
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if norm is not None:
            weight, bias = _folded(weight, bias, norm)
        self.weight = weight.to(dtype=dtype, memory_format=torch.channels_last)
        self.bias = None if bias is None else bias.to(dtype)
        self.padding, self.groups = conv.padding, conv.groups

    def __call__(self, x: Tensor, act: str = "none", residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, padding=self.padding, groups=self.groups)
        if act == "relu":
            return y.relu_()
        y = ACTIVATIONS[act](y)
        return y if residual is None else y.add_(residual)


def _folded(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (O, I, kh, kw) and bias (O,) of norm(conv(x)) as one convolution."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt() * norm.weight.detach().to(wide)
    shift = norm.bias.detach().to(wide) - norm.running_mean.to(wide) * scale
    if bias is not None:
        shift = shift + bias.to(wide) * scale
    return weight.to(wide) * scale[:, None, None, None], shift
