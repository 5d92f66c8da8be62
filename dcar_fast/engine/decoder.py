"""The fast decoder: the images of :class:`dcar_fast.models.tokenizer.DCHT`'s decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcar_fast.engine.base import without_autocast
from dcar_fast.engine.decoder_blocks import pack
from dcar_fast.engine.decoder_conv import fastest_cudnn
from dcar_fast.engine.decoder_memory import Plan, plan, within_memory
from dcar_fast.engine.pack import packed
from dcar_fast.engine.tiling import Layer, reach_of, run_blended, run_exact, scale_of, segments
from dcar_fast.models._checks import check_ids, check_tensor
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.ops import add_residual
from dcar_fast.ops._dispatch import BACKENDS

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class FastDecoder:
    """Decodes as a DCHT in eval mode does, up to rounding, in ``dtype`` (default: the decoder's own), without gradient.

    The packed weights follow the tokenizer: they are made anew when its parameters or BatchNorm buffers change, and the
    module is never touched. ``backend`` as for the ops; "auto" also heeds ``DCAR_FAST_BACKEND``.

    Where memory is short, fewer images are decoded at a time, and one image in tiles; neither changes a pixel by more
    than rounding. ``tile``: the side of a tile in latents, None for whole images unless memory is short. ``overlap``:
    None for exact tiles; else they share so many latents and no more, which is not exact (docs/decoder.md).
    """

    def __init__(
        self,
        tokenizer: DCHT,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        *,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> None:
        if not isinstance(tokenizer, DCHT):
            raise ValueError(f"tokenizer must be a DCHT, got {type(tokenizer).__name__}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be None or one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {backend!r}")
        self.tokenizer, self.dtype = tokenizer, dtype
        self._backend = None if backend == "auto" else backend
        self._run = LayersRun(self._backend, tile, overlap)

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
        self._check_device("ids", ids)
        batch, height, width = ids.shape
        if residual is not None:
            check_tensor("residual", residual, (batch, height * width, config.latent_channels), floating=True)
            self._check_device("residual", residual)
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

    def _check_device(self, name: str, value: Tensor) -> None:
        device = self.tokenizer.decoder.project_in.conv.weight.device
        if value.device != device:
            raise ValueError(f"{name} must be on the decoder's device {device}, got {value.device}")

    @torch.no_grad()
    def _decode(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        module = self.tokenizer.decoder
        self._check_device("latents", latents)
        return self._run(packed(module, ("layers", dtype), lambda decoder: pack(decoder, dtype)), latents, dtype)


class LayersRun:
    """Runs packed layers on latents: all at once, a few images at a time, or in tiles; see :class:`FastDecoder`."""

    def __init__(self, backend: str | None, tile: int | None = None, overlap: int | None = None) -> None:
        _check_count("tile", tile, 1)
        _check_count("overlap", overlap, 0)
        self.backend, self.tile, self.overlap = backend, tile, overlap

    def __call__(self, layers: list[Layer], latents: Tensor, dtype: torch.dtype) -> Tensor:
        """latents (B, C, h, w) -> images (B, 3, f h, f w) in ``dtype``, channels last."""
        latents = latents.to(dtype=dtype, memory_format=torch.channels_last)
        first = plan(layers, latents)
        if self.tile is not None:
            first = Plan(first.images, self.tile)
        with without_autocast(latents.device), fastest_cudnn(latents.device):
            parts = list(within_memory(first, latents, lambda part, tile: self._part(layers, part, tile)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, layers: list[Layer], x: Tensor, tile: int | None) -> Tensor:
        if tile is None or tile >= max(x.shape[2:]):
            for layer in layers:
                x = layer(x, self.backend)
            return x.contiguous(memory_format=torch.channels_last)
        return self._tiled(layers, x, tile)

    def _tiled(self, layers: list[Layer], x: Tensor, tile: int) -> Tensor:
        scale = 1  # pixels per latent
        *parts, last = segments(layers)
        for part in parts:
            x = part[0](x, self.backend) if part[0].reach is None else run_exact(part, x, tile * scale, self.backend)
            scale *= scale_of(part)
        if self.overlap is None or self.overlap * scale >= reach_of(last):
            return run_exact(last, x, tile * scale, self.backend)
        return run_blended(last, x, tile * scale, self.overlap * scale, self.backend)


def _check_count(name: str, value: object, least: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{name} must be None or an integer of at least {least}, got {value!r}")
