"""One way back from what was done to an instance."""

from __future__ import annotations

from torch import nn

from dcar_fast.integrations.autoencoder import DecoderPatch, is_decoder
from dcar_fast.integrations.diffloss import unpatch_diffloss


def unpatch(obj: object) -> bool:
    """Takes back what :func:`patch_diffloss` or :func:`accelerate_autoencoder` did to ``obj``; False if it was nothing.

    ``ValueError`` for what is neither an autoencoder nor holds a diffusion head.
    """
    decoder = getattr(obj, "decoder", obj)
    if isinstance(decoder, nn.Module) and is_decoder(decoder):
        return DecoderPatch(decoder).unpatch()
    return unpatch_diffloss(obj)
