"""The engine on PyTorch's own products and attention: for CPUs, where oneDNN packs the linears, for text masks with
holes, and on a GPU the one to compare the fused ops with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dcar_fast.engine.base import Engine, layer_norm
from dcar_fast.engine.head import Head
from dcar_fast.engine.linear import Linear
from dcar_fast.engine.trunk import Text, Trunk
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.diffusion_head import Dialect
from dcar_fast.noise import LatentNoise, TokenNoise
from dcar_fast.ops import latent_noise, sample_from_logits, sample_tokens
from dcar_fast.reference.diffusion import diffusion_schedule

ROWS = 1024  # positions whose logits exist at a time


class Texts(NamedTuple):
    """The prompts and the null text as the trunk's layers look at them, and which positions of both, (B, T) bool."""

    conditional: Text
    null: Text
    mask: Tensor


class PackedEngine(Engine):
    """Weights in ``dtype``; on a CPU the logits head in float32, since a product in bfloat16 would round the logits."""

    def __init__(self, model: DCAR, dtype: torch.dtype) -> None:
        super().__init__(model.config, dtype)
        self.trunk = Trunk(model, dtype)
        self.head = Head(model.head, diffusion_schedule(model.config.head_steps), dtype)
        self.to_logits = Linear.of(model.to_logits, dtype if self.device.type == "cuda" else torch.float32)

    @property
    def device(self) -> torch.device:
        return self.trunk.embedding.device

    def constants(self, grid: tuple[int, int], length: int) -> tuple:
        return self.trunk.positions(grid), self.trunk.null(length)

    def read(self, states: Tensor, mask: Tensor) -> Texts:
        return Texts(self.trunk.read(states), self.trunk.null(mask.shape[1]), mask)

    def hidden(
        self,
        ids: Tensor,
        grid: tuple[int, int],
        texts: Texts,
        guided: bool,
        rows: Tensor | None = None,
        alike: bool = False,
    ) -> Tensor:
        branches = [texts.conditional, texts.null] if guided else [texts.conditional]
        return self.trunk(ids, grid, branches, texts.mask, rows, alike)

    def null_hidden(self, ids: Tensor, grid: tuple[int, int], mask: Tensor) -> Tensor:
        return self.trunk(ids, grid, [self.trunk.null(mask.shape[1])], mask, alike=True)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.to_logits(layer_norm(hidden.float()).to(self.to_logits.weight.dtype))

    def choose(
        self, cond: Tensor, uncond: Tensor | None, *, guidance: float, noise: Tensor | TokenNoise, **settings: float
    ) -> tuple[Tensor, Tensor]:
        if self.device.type == "cuda":
            cond, uncond = (x if x is None else layer_norm(x.float()) for x in (cond, uncond))
            head = self.to_logits
            return sample_tokens(cond, uncond, head.weight, head.bias, guidance=guidance, noise=noise, **settings)
        state = layer_norm(cond.float())  # (R, D)
        if uncond is not None:
            state = state + guidance * (state - layer_norm(uncond.float()))
        found = [
            sample_from_logits(self.to_logits(block), None, guidance=0.0, noise=drawn, **settings)
            for block, drawn in zip(state.split(ROWS), _split(noise), strict=True)
        ]
        ids, confidence = (torch.cat(parts) for parts in zip(*found, strict=True))
        return ids, confidence

    def denoise(
        self,
        condition: Tensor,
        latent_init: Tensor,
        latent: Callable[[int], Tensor | LatentNoise],
        *,
        guidance: float,
        dialect: Dialect,
        progress: Callable[[int], None],
    ) -> Tensor:
        channels = self.config.latent_channels

        def normals(i: int) -> Tensor:
            noise = latent(i)
            if not isinstance(noise, LatentNoise):
                return noise
            return latent_noise(noise.seeds, noise.tokens, channels, noise.step, initial=False)

        return self.head(condition, latent_init, normals, guidance=guidance, dialect=dialect, progress=progress)


def _split(noise: Tensor | TokenNoise) -> list[Tensor | TokenNoise]:
    """The noise of every ROWS rows."""
    if isinstance(noise, Tensor):
        return list(noise.split(ROWS))
    parts = zip(noise.seeds.split(ROWS), noise.tokens.split(ROWS), strict=True)
    return [TokenNoise(seeds, tokens, noise.step) for seeds, tokens in parts]
