"""Small tokenizers whose decoders have everything a decoder can have."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from dcar_fast.config import DCHTConfig, preset
from dcar_fast.models.tokenizer import DCHT

SHAPES = preset("shapes").tokenizer
# Norms and activations the other way round, a last stage of its own, attention at the highest resolution.
SWAPPED = DCHTConfig(
    codebook_size=64,
    latent_channels=8,
    widths=(32, 32, 64, 64),
    encoder_depths=(1, 1, 1, 1),
    decoder_depths=(1, 2, 1, 1),
    blocks=("efficientvit", "res", "res", "efficientvit"),
    decoder_norms=("batch_norm", "layer_norm", "batch_norm", "batch_norm"),
    decoder_acts=("relu", "silu", "silu", "relu"),
)
# Wide enough for every way to run a convolution; deep enough below the attention for tiles to matter.
WIDE = dataclasses.replace(
    SWAPPED, widths=(64, 256, 256, 256), decoder_depths=(0, 1, 2, 1), blocks=("res", "res", "res", "efficientvit")
)
CONFIGS = {"shapes": SHAPES, "swapped": SWAPPED, "wide": WIDE}


def tokenizer(name: str, seed: int = 0) -> DCHT:
    """As after training: BatchNorms that do something."""
    torch.manual_seed(seed)
    model = DCHT(CONFIGS[name]).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.3)
    return model


def latents(model: DCHT, batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.config.latent_channels, height, width, generator=generator)


def truth(model: DCHT, x: Tensor) -> Tensor:
    """The images by the model in float64."""
    return copy.deepcopy(model).double().decode(x.double())


def eager(model: DCHT, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The images by the model in dtype."""
    model = copy.deepcopy(model)
    model.decoder.to(dtype)
    return model.decode(x)
