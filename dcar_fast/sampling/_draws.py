"""A sampler's noise as the ops take it: seeds from which kernels draw, or tensors that somebody recorded."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dcar_fast.engine.base import take
from dcar_fast.noise import ConfidenceNoise, LatentNoise, TokenNoise
from dcar_fast.ops import latent_noise
from dcar_fast.sampling.request import Request


class Draws(ABC):
    """The draws of B images of N tokens. Rows (R) are (image, position) pairs, image by image."""

    @abstractmethod
    def token(self, step: int, rows: Tensor | None) -> Tensor | TokenNoise:
        """Noise of the positions ``rows`` (B, n), or of all, for ``ops.sample_tokens``."""

    @abstractmethod
    def confidence(self, step: int) -> Tensor | ConfidenceNoise:
        """For ``ops.place_tokens``."""

    @abstractmethod
    def latent_init(self) -> Tensor:
        """(B N, C) float32."""

    @abstractmethod
    def latent(self, i: int) -> Tensor | LatentNoise:
        """For ``ops.denoise_step``."""


class SeededDraws(Draws):
    """A function of B seeds (int64, on the device) alone: what ``noise.CounterNoise`` gives them."""

    def __init__(self, seeds: Tensor, num_tokens: int, channels: int) -> None:
        self.seeds, self.channels = seeds, channels
        self.positions = torch.arange(num_tokens, device=seeds.device).expand(len(seeds), -1)  # (B, N)
        self.pairs = self._pairs(self.positions)

    def _pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.seeds[:, None].expand(-1, rows.shape[1]).flatten(), rows.flatten()

    def token(self, step: int, rows: Tensor | None) -> TokenNoise:
        return TokenNoise(*(self.pairs if rows is None else self._pairs(rows)), step)

    def confidence(self, step: int) -> ConfidenceNoise:
        return ConfidenceNoise(self.seeds, step)

    def latent_init(self) -> Tensor:
        return latent_noise(*self.pairs, self.channels, 0, initial=True)

    def latent(self, i: int) -> LatentNoise:
        return LatentNoise(*self.pairs, i)


class DrawnDraws(Draws):
    """Whatever the request's Noise returns, its shapes checked: recordings come from outside."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def token(self, step: int, rows: Tensor | None) -> Tensor:
        drawn = self._draw(f"token({step})", self.request.noise.token(step), self.request.model.codebook_size)
        return (drawn if rows is None else take(drawn, rows)).flatten(0, 1)

    def confidence(self, step: int) -> Tensor:
        return self._draw(f"confidence({step})", self.request.noise.confidence(step))

    def latent_init(self) -> Tensor:
        return self._latent("latent_init", self.request.noise.latent_init())

    def latent(self, i: int) -> Tensor:
        return self._latent(f"latent({i})", self.request.noise.latent(i))

    def _latent(self, name: str, value: Tensor) -> Tensor:
        return self._draw(name, value, self.request.model.latent_channels).flatten(0, 1)

    def _draw(self, name: str, value: Tensor, *shape: int) -> Tensor:
        return self.request.draw(name, value, *shape)
