"""Diffusion heads as other codebases have them, written anew from their public behaviour: what is to be replaced.

The names of modules, methods and arguments, and the order in which random numbers are drawn, are theirs (MAR, HART,
DC-AR); the code is not. State dicts load both ways.
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor, nn


class MeanType(enum.Enum):
    EPSILON = enum.auto()
    START_X = enum.auto()


class VarType(enum.Enum):
    LEARNED_RANGE = enum.auto()
    FIXED_LARGE = enum.auto()


class Diffusion:
    """A respaced 1000-step cosine process with a learned variance, its numbers looked up row by row."""

    def __init__(self, respacing: str) -> None:
        def signal(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        base = [min(1 - signal((i + 1) / 1000) / signal(i / 1000), 0.999) for i in range(1000)]
        survived, product = [], 1.0
        for beta in base:
            product *= 1 - beta
            survived.append(product)
        self.timestep_map = sorted(spaced(respacing))
        betas, last = [], 1.0
        for t in self.timestep_map:
            betas.append(1 - survived[t] / last)
            last = survived[t]
        self.betas = torch.tensor(betas, dtype=torch.float64)
        self.num_timesteps = len(betas)
        self.model_mean_type, self.model_var_type = MeanType.EPSILON, VarType.LEARNED_RANGE
        alpha_bar = torch.cumprod(1 - self.betas, 0)
        before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
        variance = self.betas * (1 - before) / (1 - alpha_bar)
        self.tables = {
            "x": (1 / alpha_bar).sqrt(),
            "epsilon": (1 / alpha_bar - 1).sqrt(),
            "mean_x0": self.betas * before.sqrt() / (1 - alpha_bar),
            "mean_x": (1 - before) * (1 - self.betas).sqrt() / (1 - alpha_bar),
            "largest": self.betas.log(),
            "smallest": torch.cat((variance[1:2], variance[1:])).log(),
        }

    def p_sample(self, model, x, t, clip_denoised=True, model_kwargs=None, temperature=1.0):
        look = {name: table.to(x.device)[t].float().unsqueeze(1) for name, table in self.tables.items()}
        original = torch.tensor(self.timestep_map, device=t.device)[t]
        epsilon, value = model(x, original, **(model_kwargs or {})).split(x.shape[1], dim=1)
        share = (value + 1) / 2
        log_variance = share * look["largest"] + (1 - share) * look["smallest"]
        start = look["x"] * x - look["epsilon"] * epsilon
        if clip_denoised:
            start = start.clamp(-1, 1)
        mean = look["mean_x0"] * start + look["mean_x"] * x
        noise = torch.randn_like(x)
        return mean + (t != 0).float().unsqueeze(1) * (0.5 * log_variance).exp() * noise * temperature

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, model_kwargs=None, progress=False, temperature=1.0
    ):
        x = noise
        for k in reversed(range(self.num_timesteps)):
            t = torch.full((shape[0],), k, device=x.device)
            with torch.no_grad():
                x = self.p_sample(model, x, t, clip_denoised, model_kwargs, temperature)
        return x


def spaced(respacing: str) -> set[int]:
    """As many steps in every equal section as the list says, spread by a running sum that is rounded."""
    sections = [int(part) for part in respacing.split(",")]
    kept, start = set(), 0
    for i, count in enumerate(sections):
        size = 1000 // len(sections) + (i < 1000 % len(sections))
        at, stride = 0.0, 1.0 if count <= 1 else (size - 1) / (count - 1)
        for _ in range(count):
            kept.add(start + round(at))
            at += stride
        start += size
    return kept


class TimeEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None].float() * torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=1))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class Final(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Net(nn.Module):
    """The network; its guidance formula is what codebases differ in."""

    def __init__(self, channels: int, width: int, condition: int, depth: int) -> None:
        super().__init__()
        self.in_channels = channels
        self.time_embed = TimeEmbed(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.final_layer = Final(width, 2 * channels)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        x = self.input_proj(x)
        y = self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    def guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        raise NotImplementedError

    def forward_with_cfg(self, x: Tensor, t: Tensor, c: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat((half, half)), t, c)
        epsilon, rest = out.split(self.in_channels, dim=1)
        guided = self.guided(*epsilon.chunk(2), cfg_scale)
        return torch.cat((torch.cat((guided, guided)), rest), dim=1)


class MarNet(Net):
    def guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        return unconditional + scale * (conditional - unconditional)


class HartNet(Net):
    def guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        return conditional * (1 + scale) - scale * unconditional


class _DiffLoss(nn.Module):
    network: type[Net]

    def __init__(self, target_channels: int, z_channels: int, depth: int, width: int, num_sampling_steps: str) -> None:
        super().__init__()
        self.in_channels = target_channels
        self.net = self.network(target_channels, width, z_channels, depth)
        self.train_diffusion = Diffusion("1000")
        self.gen_diffusion = Diffusion(num_sampling_steps)

    def forward(self, target: Tensor, z: Tensor) -> Tensor:
        """Not their loss: something to train."""
        return (self.net(target, torch.zeros(len(target), dtype=torch.long), z) ** 2).mean()

    def start(self, z: Tensor, cfg: float) -> tuple[Tensor, dict, object]:
        """Noise, the network's arguments and the network, guided unless cfg is 1."""
        if not cfg == 1.0:
            noise = torch.randn(z.shape[0] // 2, self.in_channels).to(z.device)
            return torch.cat((noise, noise)), {"c": z, "cfg_scale": cfg}, self.net.forward_with_cfg
        return torch.randn(z.shape[0], self.in_channels).to(z.device), {"c": z}, self.net.forward


class MarDiffLoss(_DiffLoss):
    """MAR, MaskGen, LazyMAR: unclipped, u + s (c - u)."""

    network = MarNet

    def sample(self, z, temperature=1.0, cfg=1.0):
        noise, given, network = self.start(z, cfg)
        return self.gen_diffusion.p_sample_loop(
            network,
            noise.shape,
            noise,
            clip_denoised=False,
            model_kwargs=given,
            progress=False,
            temperature=temperature,
        )


class HartDiffLoss(_DiffLoss):
    """HART (vae_scale 0.6) and DC-AR: clipped, c + s (c - u), the result scaled."""

    network = HartNet

    def __init__(self, *args, sampler: str = "iddpm", vae_scale: float = 0.6, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sampler, self.vae_scale = sampler, vae_scale

    def sample(self, z, temperature=1.0, cfg=1.5, sampler=None):
        noise, given, network = self.start(z, cfg)
        if (sampler or self.sampler) != "iddpm":
            raise NotImplementedError
        sampled = self.gen_diffusion.p_sample_loop(
            network, noise.shape, noise, clip_denoised=True, model_kwargs=given, progress=False, temperature=temperature
        )
        return sampled * self.vae_scale


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a trained size; fresh heads start with zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1.0 / max(1, parameter.shape[-1]) ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module
