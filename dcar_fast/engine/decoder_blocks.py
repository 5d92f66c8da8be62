"""The decoder's layers for inference: weights laid out once, BatchNorms folded away, channels last.

What a layer tells of itself (``outputs``, ``scale``, ``reach``, ``elements``) is explained in ``tiling.py: Layer``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast import ops
from dcar_fast.engine.decoder_conv import Conv, plain
from dcar_fast.engine.tiling import Layer
from dcar_fast.models import autoencoder as model
from dcar_fast.reference.activation import activate
from dcar_fast.reference.relu_linear_attention import relu_linear_attention


class Norm:
    """LayerNorm or RMSNorm over the channels of each pixel; with residual: residual + act(norm(x))."""

    def __init__(self, norm: nn.LayerNorm | model.RMSNorm2d, dtype: torch.dtype) -> None:
        self.weight, self.bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
        self.eps, self.centred = norm.eps, isinstance(norm, nn.LayerNorm)

    def __call__(
        self, x: Tensor, backend: str | None, residual: Tensor | None = None, activation: str = "none"
    ) -> Tensor:
        if plain("channel_norm", x, backend):
            y = activate(self._plain(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), activation)
            return y if residual is None else y.add_(residual)
        settings = {"residual": residual, "activation": activation, "eps": self.eps, "centred": self.centred}
        return ops.channel_norm(x, self.weight, self.bias, **settings, backend=backend)

    def _plain(self, x: Tensor) -> Tensor:
        """The norm over the last axis."""
        if self.centred:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps).add_(self.bias)


class Tail:
    """The convolution that ends a branch, its norm, and the residual: x + norm(conv(y))."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, dtype: torch.dtype) -> None:
        folded = norm if isinstance(norm, nn.BatchNorm2d) else None
        self.conv = Conv(conv, dtype, norm=folded)
        self.norm = None if folded is not None else Norm(norm, dtype)

    def __call__(self, y: Tensor, x: Tensor, backend: str | None) -> Tensor:
        if self.norm is None:
            return self.conv(y, backend, residual=x)
        return self.norm(self.conv(y, backend), backend, residual=x)


class ResBlock:
    scale, reach = 1, 2

    def __init__(self, block: model.ResBlock, dtype: torch.dtype) -> None:
        self.conv, self.act = Conv(block.conv1, dtype), _name(block.act)
        self.tail = Tail(block.conv2, block.norm, dtype)
        self.outputs = self.widest = block.conv2.out_channels
        self.elements = 4 * self.outputs  # x, what either convolution makes, and its sum with x

    def __call__(self, x: Tensor, backend: str | None) -> Tensor:
        return self.tail(self.conv(x, backend, self.act), x, backend)


class Attention:
    """x + norm(1x1 conv of ReLU attention)."""

    scale, reach = 1, None

    def __init__(self, attention: model.LiteMLA, dtype: torch.dtype) -> None:
        self.qkv = Conv(attention.qkv, dtype)
        self.tail = Tail(attention.proj, attention.norm, dtype)
        self.outputs, self.widest = attention.proj.out_channels, attention.qkv.out_channels
        self.elements = 9 * self.outputs  # x, q, k, v, what ReLU and padding make of them, the result

    def __call__(self, x: Tensor, backend: str | None) -> Tensor:
        qkv = self.qkv(x, backend)
        if plain("relu_linear_attention", x, backend):
            y = relu_linear_attention(qkv)
        else:
            y = ops.relu_linear_attention(qkv, backend=backend)
        return self.tail(y, x, backend)


class Mlp:
    """x + GLUMBConv(x)."""

    scale, reach = 1, 1

    def __init__(self, mlp: model.GLUMBConv, dtype: torch.dtype) -> None:
        self.inverted, self.act = Conv(mlp.inverted, dtype), _name(mlp.act)
        self.depthwise = Conv(mlp.depthwise, dtype)
        self.tail = Tail(mlp.pointwise, mlp.norm, dtype)
        self.outputs, self.widest = mlp.pointwise.out_channels, mlp.inverted.out_channels
        self.elements = self.outputs + 2 * self.widest

    def __call__(self, x: Tensor, backend: str | None) -> Tensor:
        if plain("depthwise_gate", x, backend):
            value, gate = self.depthwise(self.inverted(x, backend, self.act), backend).chunk(2, dim=1)
            y = value * activate(gate, self.act)
        else:
            y = self.inverted(x, backend)
            y = ops.depthwise_gate(y, self.depthwise.weight, self.depthwise.bias, activation=self.act, backend=backend)
        return self.tail(y, x, backend)


class Upsample:
    """Twice the height and width, by a convolution and a pixel shuffle, with or without the shortcut."""

    scale, reach = 2, 1

    def __init__(self, layer: model.Upsample, dtype: torch.dtype) -> None:
        self.conv, self.repeats = Conv(layer.conv, dtype), layer.repeats
        self.outputs, self.widest = layer.conv.out_channels // 4, layer.conv.out_channels
        self.elements = layer.conv.in_channels + 4 * self.widest  # x, the convolution, x repeated, and both shuffled

    def __call__(self, x: Tensor, backend: str | None) -> Tensor:
        y = self.conv(x, backend)
        if not self.repeats:
            return F.pixel_shuffle(y, 2)
        if not plain("upsample_shortcut", x, backend):
            return ops.upsample_shortcut(y, x, backend=backend)
        return F.pixel_shuffle(y, 2) + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2)


class Expand:
    """The decoder's first layer: latents to the width of the last stage."""

    scale, reach = 1, 1

    def __init__(self, layer: model.ChannelExpand, dtype: torch.dtype) -> None:
        self.conv, self.repeats = Conv(layer.conv, dtype), layer.repeats
        self.outputs = self.widest = layer.conv.out_channels
        self.elements = 3 * self.outputs

    def __call__(self, x: Tensor, backend: str | None) -> Tensor:
        repeated = x.permute(0, 2, 3, 1).repeat_interleave(self.repeats, dim=3).permute(0, 3, 1, 2)  # channels last
        return self.conv(x, backend, residual=repeated)


class Output:
    """Norm, ReLU and the layer that makes the three colours."""

    def __init__(self, norm: nn.Module, layer: nn.Conv2d | model.Upsample, dtype: torch.dtype) -> None:
        self.norm = Norm(norm, dtype)
        self.shuffle = isinstance(layer, model.Upsample)
        self.conv = Conv(layer.conv if self.shuffle else layer, dtype)
        self.scale, self.reach = (2 if self.shuffle else 1), 1
        self.outputs, self.widest = 3, norm.weight.numel()
        self.elements = 3 * self.widest

    def __call__(self, x: Tensor, backend: str | None) -> Tensor:
        y = self.conv(self.norm(x, backend, activation="relu"), backend)
        return F.pixel_shuffle(y, 2) if self.shuffle else y


def _name(act: nn.Module) -> str:
    return "relu" if isinstance(act, nn.ReLU) else "silu"


def pack(decoder: model.Decoder, dtype: torch.dtype) -> list[Layer]:
    """The layers in the order in which they run, first to last."""
    layers: list[Layer] = [Expand(decoder.project_in, dtype)]
    for stage in reversed(decoder.stages):
        for block in stage:
            if isinstance(block, model.Upsample):
                layers.append(Upsample(block, dtype))
            elif isinstance(block, model.ResBlock):
                layers.append(ResBlock(block, dtype))
            else:
                layers += [Attention(block.attention, dtype), Mlp(block.mlp, dtype)]
    return [*layers, Output(decoder.norm, decoder.project_out, dtype)]
