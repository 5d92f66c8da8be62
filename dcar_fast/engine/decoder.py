"""The fast decoder: the images of :class:`dcar_fast.models.tokenizer.DCHT`'s decoder."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dcar_fast.engine.decoder_blocks import pack
from dcar_fast.engine.pack import packed
from dcar_fast.models._checks import check_ids, check_tensor
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.ops import add_residual
from dcar_fast.ops._dispatch import BACKENDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class FastDecoder:
    """Decodes as a DCHT in eval mode does, up to rounding, in ``dtype`` (default: the decoder's own), without gradient.

    The packed weights follow the tokenizer: they are made anew when its parameters or BatchNorm buffers change, and the
    module is never touched. ``backend`` as for the ops; "auto" also heeds ``DCAR_FAST_BACKEND``.
    """

    def __init__(self, tokenizer: DCHT, dtype: torch.dtype | None = None, backend: str = "auto") -> None:
        if not isinstance(tokenizer, DCHT):
            raise ValueError(f"tokenizer must be a DCHT, got {type(tokenizer).__name__}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be None or one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {backend!r}")
        self.tokenizer, self.dtype = tokenizer, dtype
        self._backend = None if backend == "auto" else backend

    def decode_tokens(self, ids: Tensor, residual: Tensor | None = None) -> Tensor:
        """ids (B, h, w), or (B, N) with square N; residual (B, h*w, C) float or None (discrete path) -> images
        (B, 3, f h, f w), f = the compression."""
        config = self.tokenizer.config
        if isinstance(ids, Tensor) and ids.dim() == 2:
            side = math.isqrt(ids.shape[1])
            if side * side != ids.shape[1]:
                raise ValueError(f"ids: (B, N) needs a square N, got {tuple(ids.shape)}; pass (B, h, w) instead")
            ids = ids.unflatten(1, (side, side))
        check_ids("ids", ids, (None, None, None), config.codebook_size, empty=False)
        batch, height, width = ids.shape
        if residual is not None:
            check_tensor("residual", residual, (batch, height * width, config.latent_channels), floating=True)
            residual = residual.detach()
        dtype = self._dtype()
        codebook = self.tokenizer.quantizer.embedding.weight.detach()
        narrow = torch.float32 if dtype == torch.float64 else dtype
        return self._decode(add_residual(ids, codebook, residual, dtype=narrow, backend=self._backend), dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w), float -> images (B, 3, f h, f w)."""
        check_tensor(
            "latents", latents, (None, self.tokenizer.config.latent_channels, None, None), floating=True, empty=False
        )
        return self._decode(latents.detach(), self._dtype())

    def _dtype(self) -> torch.dtype:
        return self.dtype or self.tokenizer.decoder.project_in.conv.weight.dtype

    @torch.no_grad()
    def _decode(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        layers = packed(self.tokenizer.decoder, ("layers", dtype), lambda decoder: pack(decoder, dtype))
        x = latents.to(dtype=dtype, memory_format=torch.channels_last)
        with _without_autocast(x.device.type):
            for layer in layers:
                x = layer(x, self._backend)
        return x


def _without_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
