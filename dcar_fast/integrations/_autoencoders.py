"""Decoders of DC-AE's layout in other codebases, read into ours: efficientvit's (DC-AR's too) and diffusers'.

Their layers are taken over, not copied; where they hold something differently (three linears for one convolution), a
layer of ours is made of it. ``Unrecognised`` names what is not understood.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcar_fast.integrations._structure import Unrecognised
from dcar_fast.models import autoencoder as ours

HEAD_DIM = 32
DUPLICATING = "ChannelDuplicatingPixelUnshuffleUpSampleLayer"


def read_decoder(decoder: nn.Module) -> ours.Decoder:
    """Our decoder made of theirs."""
    if hasattr(decoder, "up_blocks"):
        return _read(Diffusers(decoder))
    if hasattr(decoder, "project_in") and hasattr(decoder, "stages"):
        return _read(EfficientViT(decoder))
    raise Unrecognised(f"{type(decoder).__name__} has neither up_blocks nor project_in and stages: no DC-AE decoder")


def _read(reader: Diffusers | EfficientViT) -> ours.Decoder:
    for module in reader.decoder.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unrecognised(f"a {type(module).__name__} of the decoder has a forward hook, which would not run")
    decoder = ours.Decoder.__new__(ours.Decoder)
    nn.Module.__init__(decoder)
    decoder.project_in = reader.project_in()
    decoder.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in reader.stages())
    decoder.norm, decoder.project_out = reader.output()
    return decoder


class Diffusers:
    """``AutoencoderDC.decoder``."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder

    def project_in(self) -> nn.Module:
        if not self.decoder.in_shortcut:
            raise Unrecognised("decoder.in_shortcut is False")
        return _expand(_conv(self.decoder.conv_in, "decoder.conv_in"))

    def stages(self) -> list[list[nn.Module]]:
        return [
            [self._block(block, f"decoder.up_blocks.{i}.{j}") for j, block in enumerate(stage)]
            for i, stage in enumerate(self.decoder.up_blocks)
        ]

    def output(self) -> tuple[nn.Module, nn.Module]:
        norm = _norm(self.decoder.norm_out, "decoder.norm_out")
        _act(self.decoder.conv_act, "decoder.conv_act", nn.ReLU)
        last, name = self.decoder.conv_out, "decoder.conv_out"
        return norm, _conv(last, name) if isinstance(last, nn.Conv2d) else self._upsample(last, name)

    def _block(self, block: nn.Module, name: str) -> nn.Module:
        kind = type(block).__name__
        if kind == "DCUpBlock2d":
            return self._upsample(block, name)
        if kind == "ResBlock":
            convs = _conv(block.conv1, f"{name}.conv1"), _conv(block.conv2, f"{name}.conv2")
            return _res_block(*convs, _norm(block.norm, f"{name}.norm"), _act(block.nonlinearity, name))
        if kind == "EfficientViTBlock":
            return _vit_block(
                self._attention(block.attn, f"{name}.attn"), self._mlp(block.conv_out, f"{name}.conv_out")
            )
        raise Unrecognised(f"{name} is a {kind}")

    def _upsample(self, block: nn.Module, name: str) -> nn.Module:
        if block.interpolate or block.factor != 2:
            raise Unrecognised(f"{name} interpolates, or by another factor than 2")
        return _upsample(_conv(block.conv, f"{name}.conv"), block.repeats if block.shortcut else 0)

    def _attention(self, attention: nn.Module, name: str) -> nn.Module:
        if len(attention.to_qkv_multiscale) or attention.attention_head_dim != HEAD_DIM:
            raise Unrecognised(f"{name} has several scales, or heads of {attention.attention_head_dim}")
        if not attention.residual_connection or attention.eps != 1e-15:
            raise Unrecognised(f"{name} has no residual connection, or eps {attention.eps}")
        _act(attention.nonlinearity, name, nn.ReLU)
        linears = [attention.to_q, attention.to_k, attention.to_v, attention.to_out]
        if any(linear.bias is not None for linear in linears):
            raise Unrecognised(f"{name} has biases")
        q, k, v, out = (linear.weight.detach() for linear in linears)
        return _lite_mla(
            _pointwise(torch.cat((q, k, v))), _pointwise(out), _norm(attention.norm_out, f"{name}.norm_out")
        )

    def _mlp(self, mlp: nn.Module, name: str) -> nn.Module:
        if not mlp.residual_connection:
            raise Unrecognised(f"{name} has no residual connection")
        convs = [_conv(getattr(mlp, part), f"{name}.{part}") for part in ("conv_inverted", "conv_depth", "conv_point")]
        return _glumb_conv(*convs, _norm(mlp.norm, f"{name}.norm"), _act(mlp.nonlinearity, name))


class EfficientViT:
    """``DCAE.decoder`` of efficientvit, and that of DC-AR's tokenizer."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder

    def project_in(self) -> nn.Module:
        layer = self.decoder.project_in
        if type(getattr(layer, "shortcut", None)).__name__ != DUPLICATING:
            raise Unrecognised("decoder.project_in has no duplicating shortcut")
        return _expand(self._bare(layer.main, "decoder.project_in.main"))

    def stages(self) -> list[list[nn.Module]]:
        return [
            [self._block(block, f"decoder.stages.{i}.op_list.{j}") for j, block in enumerate(stage.op_list)]
            for i, stage in enumerate(self.decoder.stages)
        ]

    def output(self) -> tuple[nn.Module, nn.Module]:
        norm, act, last = self.decoder.project_out.op_list
        _act(act, "decoder.project_out.op_list.1", nn.ReLU)
        name = "decoder.project_out.op_list.2"
        layer = self._bare(last, name) if type(last).__name__ == "ConvLayer" else self._shuffled(last, name, 0)
        return _norm(norm, "decoder.project_out.op_list.0"), layer

    def _block(self, block: nn.Module, name: str) -> nn.Module:
        if type(block).__name__ == "EfficientViTBlock":
            attention, mlp = block.context_module, block.local_module
            self._identity(attention, f"{name}.context_module")
            self._identity(mlp, f"{name}.local_module")
            return _vit_block(
                self._attention(attention.main, f"{name}.context_module.main"),
                self._mlp(mlp.main, f"{name}.local_module.main"),
            )
        kind = type(getattr(block, "main", None)).__name__
        if kind == "ConvPixelShuffleUpSampleLayer":
            if type(block.shortcut).__name__ != DUPLICATING:
                raise Unrecognised(f"{name} has a {type(block.shortcut).__name__}, not a duplicating shortcut")
            return self._shuffled(block.main, f"{name}.main", block.shortcut.repeats)
        if kind == "ResBlock":
            self._identity(block, name)
            first, act, no_norm = self._conv_act(block.main.conv1, f"{name}.main.conv1")
            second, no_act, norm = self._conv_act(block.main.conv2, f"{name}.main.conv2")
            if no_norm is not None or no_act is not None or norm is None or act is None:
                raise Unrecognised(f"{name}: norm or activation stand elsewhere")
            return _res_block(first, second, norm, act)
        raise Unrecognised(f"{name} is a {type(block).__name__} of {kind}")

    def _attention(self, attention: nn.Module, name: str) -> nn.Module:
        if type(attention).__name__ != "LiteMLA" or len(attention.aggreg) or attention.dim != HEAD_DIM:
            raise Unrecognised(f"{name} is a {type(attention).__name__} with several scales, or heads of another size")
        if attention.eps != 1e-15:
            raise Unrecognised(f"{name} has eps {attention.eps}")
        _act(attention.kernel_func, name, nn.ReLU)
        proj, act, norm = self._conv_act(attention.proj, f"{name}.proj")
        if act is not None or norm is None:
            raise Unrecognised(f"{name}.proj has an activation, or no norm")
        return _lite_mla(self._bare(attention.qkv, f"{name}.qkv"), proj, norm)

    def _mlp(self, mlp: nn.Module, name: str) -> nn.Module:
        if type(mlp).__name__ != "GLUMBConv":
            raise Unrecognised(f"{name} is a {type(mlp).__name__}")
        inverted, act, no_norm = self._conv_act(mlp.inverted_conv, f"{name}.inverted_conv")
        depthwise = self._bare(mlp.depth_conv, f"{name}.depth_conv")
        pointwise, no_act, norm = self._conv_act(mlp.point_conv, f"{name}.point_conv")
        if no_norm is not None or no_act is not None or norm is None or act is None:
            raise Unrecognised(f"{name}: norm or activation stand elsewhere")
        if _act(mlp.glu_act, f"{name}.glu_act") != act:
            raise Unrecognised(f"{name}.glu_act is another activation than that of inverted_conv")
        return _glumb_conv(inverted, depthwise, pointwise, norm, act)

    def _shuffled(self, layer: nn.Module, name: str, repeats: int) -> nn.Module:
        if layer.factor != 2:
            raise Unrecognised(f"{name} has factor {layer.factor}, not 2")
        return _upsample(self._bare(layer.conv, f"{name}.conv"), repeats)

    def _identity(self, block: nn.Module, name: str) -> None:
        if type(getattr(block, "shortcut", None)).__name__ != "IdentityLayer":
            raise Unrecognised(f"{name} has no identity shortcut")
        if getattr(block, "pre_norm", None) is not None or getattr(block, "post_act", None) is not None:
            raise Unrecognised(f"{name} has a norm before it or an activation behind the sum")

    def _bare(self, layer: nn.Module, name: str) -> nn.Conv2d:
        conv, act, norm = self._conv_act(layer, name)
        if act is not None or norm is not None:
            raise Unrecognised(f"{name} has a norm or an activation")
        return conv

    def _conv_act(self, layer: nn.Module, name: str) -> tuple[nn.Conv2d, str | None, nn.Module | None]:
        """(convolution, activation, norm) of a ConvLayer."""
        if type(layer).__name__ != "ConvLayer" or getattr(layer, "dropout", None) is not None:
            raise Unrecognised(f"{name} is a {type(layer).__name__}, or drops out")
        norm = None if layer.norm is None else _norm(layer.norm, f"{name}.norm")
        act = None if layer.act is None else _act(layer.act, f"{name}.act")
        return _conv(layer.conv, f"{name}.conv"), act, norm


# ---- our modules from their parts


def _conv(conv: object, name: str) -> nn.Conv2d:
    if type(conv) is not nn.Conv2d:
        raise Unrecognised(f"{name} is a {type(conv).__name__}, not PyTorch's Conv2d")
    side = conv.kernel_size[0]
    same = conv.kernel_size in ((1, 1), (3, 3)) and conv.padding == (side // 2, side // 2) and conv.stride == (1, 1)
    if not same or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        raise Unrecognised(f"{name} is {conv}, not a 1x1 or 3x3 convolution with zeros around and stride 1")
    return conv


def _pointwise(weight: Tensor) -> nn.Conv2d:
    """A 1x1 convolution with the weight (O, I) of a linear layer."""
    with torch.device("meta"):
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
    conv.weight = nn.Parameter(weight[:, :, None, None], requires_grad=False)
    return conv


def _act(act: object, name: str, wanted: type[nn.Module] | None = None) -> str:
    """The name of an activation, "relu" or "silu"."""
    kinds = {nn.ReLU: "relu", nn.SiLU: "silu"}
    if type(act) not in kinds or (wanted is not None and type(act) is not wanted):
        raise Unrecognised(
            f"{name} has a {type(act).__name__} where {wanted.__name__ if wanted else 'ReLU or SiLU'} fits"
        )
    return kinds[type(act)]


def _norm(norm: object, name: str) -> nn.Module:
    """BatchNorm2d as it is; LayerNorm and RMSNorm over channels, whatever they are called, as ours."""
    kind = type(norm).__name__
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None or bias is None:
        raise Unrecognised(f"{name} is a {kind} without weight or bias")
    if type(norm) is nn.BatchNorm2d:
        if norm.running_mean is None:
            raise Unrecognised(f"{name} keeps no running statistics")
        return norm
    if "RMSNorm" in kind:
        made: nn.Module = ours.RMSNorm2d(weight.numel(), norm.eps)
    elif "LayerNorm" in kind:
        made = ours.LayerNorm2d(weight.numel(), norm.eps)
    else:
        raise Unrecognised(f"{name} is a {kind}")
    made.weight, made.bias = nn.Parameter(weight.detach().flatten()), nn.Parameter(bias.detach().flatten())
    return made


def _made(kind: type[nn.Module], **parts: object) -> nn.Module:
    """One of our modules from what it holds."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def _expand(conv: nn.Conv2d) -> nn.Module:
    return _made(ours.ChannelExpand, conv=conv, repeats=conv.out_channels // conv.in_channels)


def _upsample(conv: nn.Conv2d, repeats: int) -> nn.Module:
    if repeats not in (0, conv.out_channels // conv.in_channels):
        raise Unrecognised(f"an upsampling shortcut repeats channels {repeats} times")
    return _made(ours.Upsample, conv=conv, repeats=repeats)


def _module(act: str) -> nn.Module:
    return nn.ReLU() if act == "relu" else nn.SiLU()


def _res_block(first: nn.Conv2d, second: nn.Conv2d, norm: nn.Module, act: str) -> nn.Module:
    return _made(ours.ResBlock, conv1=first, act=_module(act), conv2=second, norm=norm)


def _vit_block(attention: nn.Module, mlp: nn.Module) -> nn.Module:
    return _made(ours.EfficientViTBlock, attention=attention, mlp=mlp)


def _lite_mla(qkv: nn.Conv2d, proj: nn.Conv2d, norm: nn.Module) -> nn.Module:
    if qkv.out_channels != 3 * qkv.in_channels:
        raise Unrecognised(f"attention over {qkv.in_channels} channels has {qkv.out_channels} for q, k and v")
    return _made(ours.LiteMLA, qkv=qkv, proj=proj, norm=norm)


def _glumb_conv(
    inverted: nn.Conv2d, depthwise: nn.Conv2d, pointwise: nn.Conv2d, norm: nn.Module, act: str
) -> nn.Module:
    parts = {"inverted": inverted, "depthwise": depthwise, "pointwise": pointwise, "norm": norm, "act": _module(act)}
    return _made(ours.GLUMBConv, **parts)
