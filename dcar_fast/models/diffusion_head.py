"""The diffusion head: a small MLP with adaptive normalisation that denoises one residual per token.

``SimpleMLPAdaLN`` of Li et al., "Autoregressive Image Generation without Vector Quantization" (2024). Parameter names
are that family's, so the ``net.`` state of any such head loads here; the dialect (guidance formula, clipping, output
scale) is an argument of :func:`sample_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcar_fast.models._checks import check_tensor
from dcar_fast.profiling import stage
from dcar_fast.reference.denoise_step import guide, posterior_step
from dcar_fast.reference.diffusion import FREQUENCIES, Schedule, timestep_embedding


@dataclass(frozen=True)
class Dialect:
    """How a codebase samples from the head: guidance formula, clamping of x_0 to [-1, 1], factor on the result."""

    guidance: str = "c+s(c-u)"
    clip: bool = True
    scale: float = 1.0


MAR = Dialect("u+s(c-u)", clip=False)
HART = Dialect("c+s(c-u)", clip=True, scale=0.6)


class TimestepEmbedder(nn.Module):
    """Linear, SiLU, Linear of the sinusoidal embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(timesteps).to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """x + gate * mlp(LN(x) * (1 + scale) + shift); shift, scale, gate = chunk3(Linear(silu(y)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Linear(LN(x) * (1 + scale) + shift), LN without affine, eps 1e-6."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """x_t (R, C), timesteps (R,), condition (R, Z) -> (R, 2C): epsilon and the variance value v."""

    def __init__(self, channels: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.channels = channels
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self._initialise()

    def forward(self, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        dtype = self.input_proj.weight.dtype
        y = self.time_embed(timesteps) + self.cond_embed(condition.to(dtype))
        x = self.input_proj(x.to(dtype))
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    def _initialise(self) -> None:
        """Xavier linears with zero bias; modulations and the output start at zero, so every block starts as x."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for module in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)


@torch.no_grad()
def sample_rows(
    head: DiffusionHead,
    condition: Tensor,
    schedule: Schedule,
    latent_init: Tensor,
    latent: Callable[[int], Tensor],
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    dialect: Dialect = Dialect(),
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """All denoising steps of the head: condition (R, Z) -> samples, float32, times ``dialect.scale``.

    guidance 1: R independent rows; latent_init and latent(i) are (R, C). Otherwise the first R/2 rows of ``condition``
    are conditional, the others unconditional, and latent_init is (R/2, C): both halves start from it, are fed the first
    half's x_t and share the guided epsilon, but keep their own x, variance and step noise. latent(i) has R rows, and
    all R results are returned (as ``DiffLoss.sample`` does), or R/2, and only the conditional half is carried along.
    latent(i) is asked for once per step in drawing order, i = 0 first (largest timestep). ``progress(i)`` is called
    after step i.
    """
    rows = condition.shape[0]
    guided = guidance != 1.0
    if guided and rows % 2:
        raise ValueError(f"condition must have an even number of rows under guidance, got {rows}")
    half = rows // 2 if guided else rows
    check_tensor("latent_init", latent_init, (half, head.channels), floating=True)
    x = latent_init.float()
    for i, k in enumerate(reversed(range(schedule.num_steps))):
        noise = latent(i).float()
        allowed = {rows, half} if i == 0 else {len(x)}
        if noise.dim() != 2 or noise.shape[0] not in allowed or noise.shape[1] != head.channels:
            wanted = " or ".join(map(str, sorted(allowed, reverse=True)))
            raise ValueError(f"latent({i}) must be ({wanted}, {head.channels}), got {tuple(noise.shape)}")
        if len(noise) > len(x):
            x = x.repeat(2, 1)  # the unconditional half is carried along too
        fed = x[:half].repeat(2, 1) if guided else x
        timesteps = torch.full((rows,), schedule.timesteps[k], device=x.device)
        with stage("denoise", i):
            epsilon, variance = head(fed, timesteps, condition).float().chunk(2, dim=-1)
            if guided:
                epsilon = guide(epsilon[:half], epsilon[half:], guidance, dialect.guidance).repeat(2, 1)
            kept = len(x)
            x = posterior_step(
                x, epsilon[:kept], variance[:kept], noise, schedule, k, temperature=temperature, clip=dialect.clip
            )
        if progress is not None:
            progress(i)
    return x * dialect.scale
