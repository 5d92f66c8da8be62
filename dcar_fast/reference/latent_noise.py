"""Standard normals of the denoising steps for rows that are not a whole image."""

from __future__ import annotations

from torch import Tensor

from dcar_fast.noise import STREAM_LATENT, STREAM_LATENT_INIT, normal


def latent_noise(seeds: Tensor, tokens: Tensor, channels: int, step: int, *, initial: bool) -> Tensor:
    """(R, channels) float32 for seeds and tokens (R,) int64: what ``noise.CounterNoise`` gives these rows, with
    ``initial`` ``latent_init()`` (its step is 0), otherwise ``latent(step)``."""
    return normal(seeds, tokens, channels, step, STREAM_LATENT_INIT if initial else STREAM_LATENT).contiguous()
