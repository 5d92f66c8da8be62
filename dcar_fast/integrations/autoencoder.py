"""Decoders of the DC-AE family, faster: ``forward`` of one decoder instance is replaced, nothing else is touched.

accelerate_autoencoder(vae)      # diffusers' AutoencoderDC, efficientvit's DCAE, DC-AR's tokenizer
vae.decode(latents)              # as before
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcar_fast.engine.decoder import DTYPES, LayersRun
from dcar_fast.engine.decoder_blocks import pack
from dcar_fast.engine.pack import forget, packed
from dcar_fast.engine.tiling import Layer
from dcar_fast.integrations._autoencoders import read_decoder
from dcar_fast.integrations._structure import Unrecognised
from dcar_fast.ops._dispatch import BACKENDS

logger = logging.getLogger(__name__)

SIDES = (2, 7)  # latents of the compared decodes: quadratic attention in the lowest stage, and linear
TOLERANCE = 1e-3  # of the largest value, in float32
LOW_PRECISION = 2e-2  # in 16 bits, where both round at every layer


def accelerate_autoencoder(
    module: nn.Module, *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> DecoderPatch:
    """Binds a faster ``forward`` to the decoder of a DC-AE: BatchNorms folded into convolutions, weights laid out for
    the device, norms, activations and residuals fused, tiles where memory is short.

    module: what has the decoder as ``decoder`` (diffusers' AutoencoderDC, efficientvit's DCAE, DC-AR's DCHT), or the
    decoder itself. It must be in eval mode. Its first decodes are compared with the original's here: ``ValueError`` if
    they differ, and for a layout that is not understood; then nothing was changed. dtype: in which it computes, None is
    the decoder's own (or autocast's); results have the type that the original gives. backend: as for the ops.

    The weights are packed anew when they change. Calls that ask for gradients, and those in training mode, run the
    original. Returns the patch: a context manager that takes itself back at its end.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {backend!r}")
    decoder = find_decoder(module)
    bound = decoder.__dict__.get("forward")
    if bound is not None and not isinstance(bound, FastForward):
        raise Unrecognised(f"{type(decoder).__name__}.forward was already replaced on this instance, by {bound!r}")
    _first_weight(decoder)
    read_decoder(decoder)  # says what is not understood
    if decoder.training:
        raise Unrecognised(f"{type(decoder).__name__} is in training mode: call eval() first")
    forward = FastForward(decoder, dtype, None if backend == "auto" else backend)
    forward.compare()
    decoder.__dict__["forward"] = forward
    logger.info("%s.forward runs on dcar_fast", type(decoder).__name__)
    return DecoderPatch(decoder)


def find_decoder(module: nn.Module) -> nn.Module:
    """The decoder of a module: its ``decoder``, or itself."""
    if not isinstance(module, nn.Module):
        raise Unrecognised(f"module is a {type(module).__name__}, not a torch module")
    decoder = getattr(module, "decoder", module)
    if not isinstance(decoder, nn.Module):
        raise Unrecognised(f"{type(module).__name__}.decoder is a {type(decoder).__name__}")
    return decoder


def is_decoder(module: nn.Module) -> bool:
    """Whether the module begins as a decoder of the DC-AE family does."""
    try:
        _first_weight(module)
    except Unrecognised:
        return False
    return True


@dataclass(frozen=True)
class DecoderPatch:
    """What :func:`accelerate_autoencoder` did. As a context manager it is taken back at the end."""

    decoder: nn.Module

    def unpatch(self) -> bool:
        """Whether there was anything to take back."""
        patched = isinstance(self.decoder.__dict__.get("forward"), FastForward)
        if patched:
            del self.decoder.__dict__["forward"]
            forget(self.decoder)
        return patched

    def __enter__(self) -> DecoderPatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.unpatch()


class FastForward:
    """What is called instead of ``forward`` on one decoder. Copies and pickles go along with the instance."""

    def __init__(self, decoder: nn.Module, dtype: torch.dtype | None, backend: str | None) -> None:
        self.decoder, self.dtype, self.backend = decoder, dtype, backend
        self._said: set[str] = set()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = self._reason(x, args, kwargs)
        if reason is None:
            return self._run(x)
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("%s.forward runs the original: %s", type(self.decoder).__name__, reason)
        return type(self.decoder).forward(self.decoder, x, *args, **kwargs)

    @torch.no_grad()
    def compare(self) -> None:
        """``Unrecognised`` unless ours gives the original's images on small random latents."""
        weight = _first_weight(self.decoder)
        exact = self.dtype in (None, weight.dtype) and weight.dtype in (torch.float32, torch.float64)
        allowed = TOLERANCE if exact else LOW_PRECISION
        draw = torch.Generator().manual_seed(0)
        for side in SIDES:
            latents = torch.randn(2, weight.shape[1], side, side + 1, generator=draw).to(weight)
            theirs, ours = type(self.decoder).forward(self.decoder, latents), self._run(latents)
            if theirs.shape != ours.shape:
                raise Unrecognised(f"the decoder gives {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
            off, largest = (theirs.float() - ours.float()).abs().max().item(), theirs.float().abs().max().item()
            if not off <= allowed * largest:
                raise Unrecognised(f"the decoder computes something else: off by {off:.2g} of {largest:.2g}")

    def _reason(self, x: object, args: tuple, kwargs: dict) -> str | None:
        """Why the original has to run; None where ours can."""
        weight = _first_weight(self.decoder)
        if args or kwargs:
            return "arguments beyond the latents"
        if self.decoder.training:
            return "training mode"
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != weight.shape[1] or not x.is_floating_point():
            return "no latents (B, C, h, w)"
        if not x.numel() or x.device != weight.device:
            return "empty latents, or on another device"
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.decoder.parameters())):
            return "gradients are asked for: use torch.no_grad()"
        return None

    @torch.no_grad()
    def _run(self, x: Tensor) -> Tensor:
        weight = _first_weight(self.decoder)
        kind = x.device.type
        natural = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        dtype = self.dtype or natural

        def build(decoder: nn.Module) -> list[Layer]:
            return pack(read_decoder(decoder), dtype)

        layers = packed(self.decoder, ("autoencoder", dtype), build, wait=True)
        return LayersRun(self.backend)(layers, x, dtype).to(natural)


def _first_weight(decoder: nn.Module) -> Tensor:
    """(width, C, 3, 3) of the first convolution."""
    first = getattr(decoder, "conv_in", None)
    if first is None:
        first = getattr(getattr(getattr(decoder, "project_in", None), "main", None), "conv", None)
    if not isinstance(first, nn.Conv2d):
        raise Unrecognised(f"{type(decoder).__name__} has no first convolution where DC-AE decoders have it")
    return first.weight
