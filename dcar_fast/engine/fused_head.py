"""The diffusion head on ``ops.denoise_step``: a fixed number of launches a step, nothing looked at on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dcar_fast.models.diffusion_head import Dialect
from dcar_fast.noise import LatentNoise
from dcar_fast.ops._head import embed_condition, embed_timesteps, modulations, pack_head, step_coefficients
from dcar_fast.ops.denoise_step import denoise_step
from dcar_fast.profiling import stage
from dcar_fast.reference.diffusion import Schedule


class FusedHead:
    """A DiffusionHead, ours or another codebase's with the same modules, packed in ``dtype`` for one schedule."""

    def __init__(self, head: nn.Module, schedule: Schedule, dtype: torch.dtype, backend: str | None) -> None:
        self.weights, self.backend = pack_head(head, dtype), backend
        self.channels = self.weights.channels
        self.steps = step_coefficients(schedule, self.weights.input_weight.device)  # (K, 8)
        self.times = embed_timesteps(self.weights, schedule.timesteps)  # (K, W)

    def __call__(
        self,
        condition: Tensor,
        latent_init: Tensor,
        latent: Callable[[int], Tensor | LatentNoise],
        *,
        guidance: float | Tensor,
        dialect: Dialect,
        temperature: float = 1.0,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """condition (R, Z), [cond; uncond] unless guidance is 1 -> samples float32, as many as in latent_init: R, or
        R/2 under guidance, where only the conditional half is carried along."""
        embedded = embed_condition(self.weights, condition)  # (R, W)
        settings = {"guidance": guidance, "temperature": temperature, "formula": dialect.guidance, "clip": dialect.clip}
        x = latent_init
        for i, k in enumerate(reversed(range(len(self.steps)))):
            with stage("denoise", i):
                modulation = modulations(self.weights, embedded, self.times[k])
                noise = latent(i)
                x = denoise_step(x, modulation, self.weights, self.steps[k], noise, backend=self.backend, **settings)
            if progress is not None:
                progress(i)
        return x * dialect.scale
