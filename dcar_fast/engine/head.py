"""The diffusion head over all its steps, without what repeats or cannot matter.

Against the module this skips, exactly: the projection of the condition in every step, the embeddings of the timesteps
(constants of the model), the first projection of the unconditional rows (both branches see the same x_t), and their
variance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.engine.linear import Linear
from dcar_fast.models.diffusion_head import Dialect, DiffusionHead
from dcar_fast.profiling import stage
from dcar_fast.reference.denoise_step import guide, posterior_step
from dcar_fast.reference.diffusion import Schedule


class Head:
    """A DiffusionHead packed in ``dtype`` for one schedule."""

    def __init__(self, head: DiffusionHead, schedule: Schedule, dtype: torch.dtype) -> None:
        self.channels, self.schedule, self.dtype = head.channels, schedule, dtype
        device = head.input_proj.weight.device
        with torch.no_grad():
            times = head.time_embed(torch.tensor(schedule.timesteps, device=device))
        self.times = times.to(dtype)  # (K, W)
        self.cond_embed, self.input_proj = Linear.of(head.cond_embed, dtype), Linear.of(head.input_proj, dtype)
        self.blocks = [
            (
                (block.in_ln.weight.detach().to(dtype), block.in_ln.bias.detach().to(dtype)),
                Linear.of(block.mlp[0], dtype),
                Linear.of(block.mlp[2], dtype),
                Linear.of(block.adaLN_modulation[1], dtype),
            )
            for block in head.res_blocks
        ]
        final = head.final_layer
        self.final_modulation = Linear.of(final.adaLN_modulation[1], dtype)
        self.output = Linear.of(final.linear, dtype)
        self.epsilon = Linear(final.linear.weight[: head.channels], final.linear.bias[: head.channels], dtype)

    def __call__(
        self,
        condition: Tensor,
        latent_init: Tensor,
        latent: Callable[[int], Tensor],
        *,
        guidance: float,
        dialect: Dialect,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """condition (R, Z), [cond; uncond] unless guidance is 1 -> samples (R/2 or R, C) float32.

        As ``models.diffusion_head.sample_rows`` with only the conditional half carried along.
        """
        guided = guidance != 1.0
        kept = len(condition) // 2 if guided else len(condition)
        embedded = self.cond_embed(condition.to(self.dtype))  # (R, W)
        x = latent_init
        for i, k in enumerate(reversed(range(self.schedule.num_steps))):
            with stage("denoise", i):
                epsilon, variance, unconditional = self._network(x, F.silu(embedded + self.times[k]), kept)
                if guided:
                    epsilon = guide(epsilon, unconditional, guidance, dialect.guidance)
                x = posterior_step(x, epsilon, variance, latent(i), self.schedule, k, clip=dialect.clip)
            if progress is not None:
                progress(i)
        return x * dialect.scale

    def _network(self, x: Tensor, y: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        """x (kept, C), silu(y) (R, W) -> epsilon and variance (kept, C), epsilon of the other rows (R - kept, C)."""
        h = self.input_proj(x.to(self.dtype))
        h = h if kept == len(y) else h.repeat(2, 1)
        for norm, fc1, fc2, modulation in self.blocks:
            shift, scale, gate = modulation(y).chunk(3, dim=-1)
            normed = F.layer_norm(h, h.shape[-1:], *norm, eps=1e-6)
            h = torch.addcmul(h, gate, fc2(F.silu(fc1(torch.addcmul(normed + shift, normed, scale)))))
        shift, scale = self.final_modulation(y).chunk(2, dim=-1)
        h = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        epsilon, variance = self.output(h[:kept]).float().chunk(2, dim=-1)
        return epsilon, variance, self.epsilon(h[kept:]).float()
