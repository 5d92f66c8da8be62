"""The diffusion head over all its steps, without what repeats or cannot matter.

Against the module this skips, exactly: the projection of the condition in every step, the embeddings of the timesteps
(constants of the model), the first projection of the unconditional rows (both branches see the same x_t), and their
variance where nobody wants it. The modulations, three fifths of all products, depend on condition and timestep alone:
those of several steps are one product, so that few rows do not mean slow products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.engine.linear import Linear
from dcar_fast.models.diffusion_head import Dialect
from dcar_fast.profiling import stage
from dcar_fast.reference.denoise_step import EPS, guide, posterior_step
from dcar_fast.reference.diffusion import Schedule

ROWS = 512  # of condition and timestep whose modulations are one product: more make it no faster


class Head:
    """A DiffusionHead, ours or another codebase's with the same modules, packed in ``dtype`` for one schedule."""

    def __init__(self, head: nn.Module, schedule: Schedule, dtype: torch.dtype) -> None:
        self.channels, self.schedule, self.dtype = head.input_proj.in_features, schedule, dtype
        device = head.input_proj.weight.device
        with torch.no_grad():
            times = head.time_embed(torch.tensor(schedule.timesteps, device=device))
            final = head.final_layer
            layers = [*(block.adaLN_modulation[1] for block in head.res_blocks), final.adaLN_modulation[1]]
            weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        self.times = times.to(dtype)  # (K, W)
        self.cond_embed, self.input_proj = Linear.of(head.cond_embed, dtype), Linear.of(head.input_proj, dtype)
        self.modulation = Linear(weight, bias, dtype)  # W -> 3DW + 2W
        self.blocks = [
            (
                (block.in_ln.weight.detach().to(dtype), block.in_ln.bias.detach().to(dtype)),
                Linear.of(block.mlp[0], dtype),
                Linear.of(block.mlp[2], dtype),
            )
            for block in head.res_blocks
        ]
        self.output = Linear.of(final.linear, dtype)
        self.epsilon = Linear(final.linear.weight[: self.channels], final.linear.bias[: self.channels], dtype)

    def __call__(
        self,
        condition: Tensor,
        latent_init: Tensor,
        latent: Callable[[int], Tensor],
        *,
        guidance: float | Tensor,
        dialect: Dialect,
        temperature: float = 1.0,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """condition (R, Z), [cond; uncond] unless guidance is 1 -> samples float32, as many as in latent_init.

        As ``models.diffusion_head.sample_rows``: under guidance latent_init and latent(i) have R/2 rows, and only the
        conditional half is carried along, or R. A scalar tensor is guidance whatever its value.
        """
        rows, guided = len(condition), isinstance(guidance, Tensor) or guidance != 1.0
        half = rows // 2 if guided else rows
        embedded = self.cond_embed(condition.to(self.dtype))  # (R, W)
        x = latent_init
        for i, (k, modulation) in enumerate(self._modulations(embedded)):
            with stage("denoise", i):
                h = self.input_proj(x[:half].to(self.dtype))
                h = self._blocks(h.repeat(2, 1) if guided else h, modulation)
                epsilon, variance = self._outputs(h, len(x))
                if guided:
                    epsilon = guide(epsilon[:half], epsilon[half:], guidance, dialect.guidance)
                    epsilon = epsilon if len(x) == half else epsilon.repeat(2, 1)
                settings = {"temperature": temperature, "clip": dialect.clip}
                x = posterior_step(x, epsilon, variance, latent(i), self.schedule, k, **settings)
            if progress is not None:
                progress(i)
        return x * dialect.scale

    def _modulations(self, embedded: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(k, modulation (R, 3DW + 2W)) of all steps, from the conditions (R, W)."""
        steps = range(self.schedule.num_steps - 1, -1, -1)
        together = max(1, ROWS // max(1, len(embedded)))
        for start in range(0, len(steps), together):
            some = steps[start : start + together]  # descending
            times = self.times[some[-1] : some[0] + 1].flip(0)
            y = F.silu(embedded + times.unsqueeze(1))  # (S, R, W)
            yield from zip(some, self.modulation(y.flatten(0, 1)).unflatten(0, y.shape[:2]), strict=True)

    def _blocks(self, h: Tensor, modulation: Tensor) -> Tensor:
        """(R, W) of the input projection -> what the output projects (R, W)."""
        width = h.shape[1]
        parts = iter(modulation.split(width, dim=1))
        for norm, fc1, fc2 in self.blocks:
            shift, scale, gate = next(parts), next(parts), next(parts)
            normed = F.layer_norm(h, (width,), *norm, eps=EPS)
            h = torch.addcmul(h, gate, fc2(F.silu(fc1(torch.addcmul(normed + shift, normed, scale)))))
        shift, scale = parts
        return F.layer_norm(h, (width,), eps=EPS) * (1 + scale) + shift

    def _outputs(self, h: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """epsilon (R, C) and the variance values of the first ``kept`` rows, float32."""
        epsilon, variance = self.output(h[:kept]).float().chunk(2, dim=1)
        if kept < len(h):
            epsilon = torch.cat((epsilon, self.epsilon(h[kept:]).float()))
        return epsilon, variance
