"""DC-AE encoder and decoder (f32c32 layout): residual convolution stages, then EfficientViT stages.

Layout of Chen et al., "Deep Compression Autoencoder" (ICLR 2025), as DC-AR's DC-HT tokenizer uses it. Fully
convolutional in both axes: any height and width that are multiples of the compression.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.config import DCHTConfig
from dcar_fast.reference.relu_linear_attention import relu_linear_attention


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (B, C, H, W), affine, eps 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RMSNorm2d(nn.RMSNorm):
    """RMSNorm over the channels of each pixel of (B, C, H, W), with a bias: DC-AE has it where DC-HT has LayerNorm."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x.permute(0, 2, 3, 1)) + self.bias).permute(0, 3, 1, 2)


def _norm(name: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-5) if name == "batch_norm" else LayerNorm2d(channels, eps=1e-5)


def _act(name: str) -> nn.Module:
    return nn.ReLU() if name == "relu" else nn.SiLU()


def _conv3x3(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def channel_mean(x: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) -> (B, channels, H, W): mean over consecutive groups of channels."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


class ResBlock(nn.Module):
    """x + norm(conv2(act(conv1(x)))), no activation after the addition."""

    def __init__(self, channels: int, norm: str, act: str) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, channels)
        self.act = _act(act)
        self.conv2 = _conv3x3(channels, channels, bias=False)
        self.norm = _norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.act(self.conv1(x))))


class LiteMLA(nn.Module):
    """1x1 conv to 3C, ReLU linear attention, 1x1 conv, norm."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.proj = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = _norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(relu_linear_attention(self.qkv(x))))


class GLUMBConv(nn.Module):
    """1x1 conv to 8C, act, depthwise 3x3, x * act(gate) over the two halves, 1x1 conv to C, norm."""

    def __init__(self, channels: int, norm: str, act: str) -> None:
        super().__init__()
        self.inverted = nn.Conv2d(channels, 8 * channels, 1)
        self.act = _act(act)
        self.depthwise = nn.Conv2d(8 * channels, 8 * channels, 3, padding=1, groups=8 * channels)
        self.pointwise = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.norm = _norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.depthwise(self.act(self.inverted(x))).chunk(2, dim=1)
        return self.norm(self.pointwise(x * self.act(gate)))


class EfficientViTBlock(nn.Module):
    """x += LiteMLA(x); x += GLUMBConv(x)."""

    def __init__(self, channels: int, norm: str, act: str) -> None:
        super().__init__()
        self.attention = LiteMLA(channels, norm)
        self.mlp = GLUMBConv(channels, norm, act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Downsample(nn.Module):
    """conv3x3 to out/4 channels, pixel_unshuffle(2); shortcut: pixel_unshuffle(2), mean over channel groups."""

    def __init__(self, inputs: int, outputs: int, shortcut: bool = True) -> None:
        super().__init__()
        self.conv = _conv3x3(inputs, outputs // 4)
        self.outputs, self.shortcut = outputs, shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_unshuffle(self.conv(x), 2)
        return y + channel_mean(F.pixel_unshuffle(x, 2), self.outputs) if self.shortcut else y


class Upsample(nn.Module):
    """conv3x3 to 4 out channels, pixel_shuffle(2); shortcut: repeat_interleave channels, pixel_shuffle(2)."""

    def __init__(self, inputs: int, outputs: int, shortcut: bool = True) -> None:
        super().__init__()
        self.conv = _conv3x3(inputs, 4 * outputs)
        self.repeats = 4 * outputs // inputs if shortcut else 0

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(self.conv(x), 2)
        return y + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2) if self.repeats else y


class ChannelReduce(nn.Module):
    """Encoder output: conv3x3 to C channels plus the mean over channel groups."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _conv3x3(inputs, outputs)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + channel_mean(x, self.outputs)


class ChannelExpand(nn.Module):
    """Decoder input: conv3x3 from C channels plus the repeated channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _conv3x3(inputs, outputs)
        self.repeats = outputs // inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x.repeat_interleave(self.repeats, dim=1)


def _blocks(config: DCHTConfig, stage: int, depth: int, norm: str, act: str) -> list[nn.Module]:
    width = config.widths[stage]
    if config.blocks[stage] == "res":
        return [ResBlock(width, norm, act) for _ in range(depth)]
    return [EfficientViTBlock(width, norm, act) for _ in range(depth)]


class Encoder(nn.Module):
    """(B, 3, H, W) images in [-1, 1] -> (B, C, H/f, W/f), f = the compression."""

    def __init__(self, config: DCHTConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        stage0 = config.encoder_depths[0] > 0
        self.project_in = _conv3x3(3, widths[0]) if stage0 else Downsample(3, widths[1], shortcut=False)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.encoder_depths):
            stage = _blocks(config, i, depth, config.encoder_norm, config.encoder_act)
            if depth and i < last:
                stage.append(Downsample(widths[i], widths[i + 1]))
            self.stages.append(nn.Sequential(*stage))
        self.project_out = ChannelReduce(widths[-1], config.latent_channels)

    def forward(self, images: Tensor) -> Tensor:
        x = self.project_in(images)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x)


class Decoder(nn.Module):
    """(B, C, h, w) latents -> (B, 3, f h, f w) images, f = the compression. Stages run from the last to the first."""

    def __init__(self, config: DCHTConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.project_in = ChannelExpand(config.latent_channels, widths[-1])
        self.stages = nn.ModuleList()
        for i, depth in enumerate(config.decoder_depths):
            stage = _blocks(config, i, depth, config.decoder_norms[i], config.decoder_acts[i])
            if depth and i < last:
                stage.insert(0, Upsample(widths[i + 1], widths[i]))
            self.stages.append(nn.Sequential(*stage))
        stage0 = config.decoder_depths[0] > 0
        width = widths[0] if stage0 else widths[1]
        self.norm = LayerNorm2d(width, eps=1e-5)
        self.project_out = _conv3x3(width, 3) if stage0 else Upsample(width, 3, shortcut=False)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.project_in(latents)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(F.relu(self.norm(x)))
