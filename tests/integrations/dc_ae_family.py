"""DC-AE decoders as diffusers and efficientvit hold them, written anew: their modules' names, not their code.

Small: three stages of widths (8, 16, 32), the lowest one with attention; latents of 4 channels, images 4 times larger.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS, CHANNELS = (8, 16, 32), 4


class RMSNorm(nn.Module):
    """Over the last axis, with a bias."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias


def last(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.movedim(1, -1)).movedim(-1, 1)


def relu_attention(qkv: Tensor, head: int = 32) -> Tensor:
    """(B, 3C, H, W), heads interleaved -> (B, C, H, W)."""
    q, k, v = qkv.flatten(2).unflatten(1, (-1, 3 * head)).split(head, dim=2)  # (B, heads, head, N)
    weight = torch.einsum("bhdn,bhdm->bhnm", k.relu(), q.relu())
    out = torch.einsum("bhdn,bhnm->bhdm", v, weight / (weight.sum(2, keepdim=True) + 1e-15))
    return out.flatten(1, 2).unflatten(2, qkv.shape[2:])


def repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=1)


# ---- diffusers


class ResBlock(nn.Module):
    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.norm_type = norm
        self.nonlinearity = nn.ReLU() if norm == "batch_norm" else nn.SiLU()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width) if norm == "batch_norm" else RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.nonlinearity(self.conv1(x)))
        return x + (self.norm(y) if self.norm_type == "batch_norm" else last(self.norm, y))


class SanaMultiscaleLinearAttention(nn.Module):
    def __init__(self, width: int, scales: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.eps, self.attention_head_dim, self.residual_connection = 1e-15, 32, True
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_qkv_multiscale = nn.ModuleList(nn.Identity() for _ in scales)
        self.nonlinearity = nn.ReLU()
        self.to_out, self.norm_out = nn.Linear(width, width, bias=False), RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.movedim(1, -1)
        qkv = torch.cat([self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)], dim=-1).movedim(-1, 1)
        return x + self.norm_out(self.to_out(relu_attention(qkv).movedim(1, -1))).movedim(-1, 1)


class GLUMBConv(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.residual_connection = True
        self.nonlinearity = nn.SiLU()
        self.conv_inverted = nn.Conv2d(width, 8 * width, 1)
        self.conv_depth = nn.Conv2d(8 * width, 8 * width, 3, 1, 1, groups=8 * width)
        self.conv_point = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.conv_depth(self.nonlinearity(self.conv_inverted(x))).chunk(2, dim=1)
        return x + last(self.norm, self.conv_point(y * self.nonlinearity(gate)))


class EfficientViTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.conv_out = SanaMultiscaleLinearAttention(width), GLUMBConv(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class DCUpBlock2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, shortcut: bool = True) -> None:
        super().__init__()
        self.interpolate, self.shortcut, self.factor = False, shortcut, 2
        self.repeats = 4 * outputs // inputs
        self.conv = nn.Conv2d(inputs, 4 * outputs, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(self.conv(x), 2)
        return y + F.pixel_shuffle(repeat(x, self.repeats), 2) if self.shortcut else y


class Decoder(nn.Module):
    def __init__(self, stage0: int = 1) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.conv_in, self.in_shortcut = nn.Conv2d(CHANNELS, c, 3, 1, 1), True
        first = [DCUpBlock2d(b, a), ResBlock(a, "batch_norm")] if stage0 else []
        second = [DCUpBlock2d(c, b), ResBlock(b, "rms_norm"), ResBlock(b, "batch_norm")]
        stages = [first, second, [EfficientViTBlock(c), EfficientViTBlock(c)]]
        self.up_blocks = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        width = a if stage0 else b
        self.norm_out, self.conv_act = RMSNorm(width), nn.ReLU()
        self.conv_out = nn.Conv2d(width, 3, 3, 1, 1) if stage0 else DCUpBlock2d(width, 3, shortcut=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x) + repeat(x, WIDTHS[-1] // CHANNELS)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.conv_out(self.conv_act(last(self.norm_out, x)))


class AutoencoderDC(nn.Module):
    def __init__(self, stage0: int = 1) -> None:
        super().__init__()
        self.decoder = Decoder(stage0)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


# ---- efficientvit


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TritonRMSNorm2d(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int = 3, bias: bool = True, norm=None, act=None, groups=1):
        super().__init__()
        self.dropout = None
        self.conv = nn.Conv2d(inputs, outputs, side, 1, side // 2, groups=groups, bias=bias)
        self.norm, self.act = norm, act

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv, self.norm, self.act):
            x = x if layer is None else layer(x)
        return x


class IdentityLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class ResidualBlock(nn.Module):
    def __init__(self, main: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.pre_norm, self.main, self.shortcut, self.post_act = None, main, shortcut, None

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.shortcut(x)


class OpSequential(nn.Module):
    def __init__(self, ops: list[nn.Module]) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x


def _res_block(width: int, norm: nn.Module, act: nn.Module) -> ResidualBlock:
    class ResBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = ConvLayer(width, width, act=act)
            self.conv2 = ConvLayer(width, width, bias=False, norm=norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x))

    return ResidualBlock(ResBlock(), IdentityLayer())


def _vit_block(width: int, norm: type[nn.Module]) -> nn.Module:
    class LiteMLA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps, self.dim, self.aggreg, self.kernel_func = 1e-15, 32, nn.ModuleList(), nn.ReLU()
            self.qkv = ConvLayer(width, 3 * width, 1, bias=False)
            self.proj = ConvLayer(width, width, 1, bias=False, norm=norm(width))

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(relu_attention(self.qkv(x)))

    class GLUMBConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.glu_act = nn.SiLU()
            self.inverted_conv = ConvLayer(width, 8 * width, 1, act=nn.SiLU())
            self.depth_conv = ConvLayer(8 * width, 8 * width, groups=8 * width)
            self.point_conv = ConvLayer(4 * width, width, 1, bias=False, norm=norm(width))

        def forward(self, x: Tensor) -> Tensor:
            y, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
            return self.point_conv(y * self.glu_act(gate))

    class EfficientViTBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.context_module = ResidualBlock(LiteMLA(), IdentityLayer())
            self.local_module = ResidualBlock(GLUMBConv(), IdentityLayer())

        def forward(self, x: Tensor) -> Tensor:
            return self.local_module(self.context_module(x))

    return EfficientViTBlock()


class ConvPixelShuffleUpSampleLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.factor, self.conv = 2, ConvLayer(inputs, 4 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class ChannelDuplicatingPixelUnshuffleUpSampleLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, factor: int) -> None:
        super().__init__()
        self.factor, self.repeats = factor, outputs * factor**2 // inputs

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(repeat(x, self.repeats), self.factor)


class EfficientViTDecoder(nn.Module):
    def __init__(self, norm: type[nn.Module], stage0: int = 1) -> None:
        super().__init__()
        a, b, c = WIDTHS

        def up(inputs: int, outputs: int) -> ResidualBlock:
            shortcut = ChannelDuplicatingPixelUnshuffleUpSampleLayer(inputs, outputs, 2)
            return ResidualBlock(ConvPixelShuffleUpSampleLayer(inputs, outputs), shortcut)

        shortcut = ChannelDuplicatingPixelUnshuffleUpSampleLayer(CHANNELS, c, 1)
        self.project_in = ResidualBlock(ConvLayer(CHANNELS, c), shortcut)
        first = [up(b, a), _res_block(a, nn.BatchNorm2d(a), nn.ReLU())] if stage0 else []
        second = [up(c, b), _res_block(b, nn.BatchNorm2d(b), nn.ReLU()), _res_block(b, norm(b), nn.SiLU())]
        stages = [first, second, [_vit_block(c, norm), _vit_block(c, norm)]]
        self.stages = nn.ModuleList(OpSequential(stage) for stage in stages)
        width = a if stage0 else b
        output = ConvLayer(width, 3) if stage0 else ConvPixelShuffleUpSampleLayer(width, 3)
        self.project_out = OpSequential([norm(width), nn.ReLU(), output])

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)


class DCAE(nn.Module):
    def __init__(self, norm: type[nn.Module] = TritonRMSNorm2d, stage0: int = 1) -> None:
        super().__init__()
        self.decoder = EfficientViTDecoder(norm, stage0)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


def trained(module: nn.Module) -> nn.Module:
    """In eval mode, with norms and running statistics of their own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point() and value.dim() == 1:
                draw = torch.rand(value.shape, generator=generator)
                value.copy_(draw + 0.5 if "weight" in name or "var" in name else draw - 0.5)
    return module.eval()
