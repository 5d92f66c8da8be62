"""The decoder with its BatchNorms folded away, channels last."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dcar_fast.models.autoencoder import Decoder, ResBlock


class FastDecoder:
    """A Decoder for inference in ``dtype``: (B, C, h, w) latents -> (B, 3, f h, f w) images.

    The BatchNorm of a ResBlock is folded into the convolution in front of it; everything runs channels last.
    """

    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        decoder = copy.deepcopy(decoder).eval().requires_grad_(False)
        for module in decoder.modules():
            if isinstance(module, ResBlock) and isinstance(module.norm, nn.BatchNorm2d):
                module.conv2, module.norm = fuse_conv_bn_eval(module.conv2, module.norm), nn.Identity()
        self.decoder = decoder.to(dtype=dtype, memory_format=torch.channels_last)
        self.dtype = dtype

    def __call__(self, latents: Tensor) -> Tensor:
        return self.decoder(latents.to(dtype=self.dtype, memory_format=torch.channels_last))
