"""DC-HT, the deep-compression hybrid tokenizer: images <-> discrete tokens and continuous residuals."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.config import DCHTConfig
from dcar_fast.models._checks import check_ids, check_tensor
from dcar_fast.models.autoencoder import Decoder, Encoder
from dcar_fast.models.quantizer import Lookup, Quantizer, Tokens
from dcar_fast.reference.vq_lookup import vq_lookup

__all__ = ["DCHT", "Tokens"]


class DCHT(nn.Module):
    """Tokenizer with two decoding paths: discrete, decode(codes), and hybrid, decode(codes + residual).

    ``lookup`` is the nearest-code search, see :class:`dcar_fast.models.quantizer.Quantizer`.
    """

    def __init__(self, config: DCHTConfig | None = None, lookup: Lookup = vq_lookup) -> None:
        super().__init__()
        self.config = config = DCHTConfig() if config is None else config
        if not isinstance(config, DCHTConfig):
            raise ValueError(f"config must be a DCHTConfig, got {type(config).__name__}")
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = Quantizer(config.codebook_size, config.latent_channels, lookup)

    def encode(self, images: Tensor) -> Tokens:
        """images (B, 3, H, W), float in [-1, 1], H and W multiples of ``config.compression`` -> Tokens."""
        f = self.config.compression
        check_tensor("images", images, (None, 3, None, None), floating=True)
        height, width = images.shape[2:]
        if height % f or width % f or not images.numel():
            sizes = f"multiples of {f} and there must be at least one image"
            raise ValueError(f"images: height and width must be {sizes}, got {len(images)} of {height} x {width}")
        return self.quantizer(self.encoder(images.to(self._dtype)))

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w), float -> images (B, 3, f h, f w) in the decoder's dtype, nominally in [-1, 1]."""
        check_tensor("latents", latents, (None, self.config.latent_channels, None, None), floating=True, empty=False)
        return self.decoder(latents.to(self._dtype))

    def decode_tokens(self, ids: Tensor, residual: Tensor | None = None) -> Tensor:
        """ids (B, h, w), or (B, N) with square N; residual (B, N, C) float or None (discrete path) -> images."""
        if isinstance(ids, Tensor) and ids.dim() == 2:
            side = math.isqrt(ids.shape[1])
            if side * side != ids.shape[1]:
                raise ValueError(f"ids: (B, N) needs a square N, got {tuple(ids.shape)}; pass (B, h, w) instead")
            ids = ids.unflatten(1, (side, side))
        check_ids("ids", ids, (None, None, None), self.config.codebook_size, empty=False)
        batch, height, width = ids.shape
        codes = F.embedding(ids, self.quantizer.codes())  # (B, h, w, C)
        if residual is not None:
            check_tensor("residual", residual, (batch, height * width, self.config.latent_channels), floating=True)
            codes = codes + residual.float().view_as(codes)
        return self.decode(codes.permute(0, 3, 1, 2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tokens]:
        """The hybrid reconstruction (B, 3, H, W) and the tokens."""
        tokens = self.encode(images)
        return self.decode(tokens.features), tokens

    @property
    def _dtype(self):
        return self.decoder.project_in.conv.weight.dtype
