"""The sampler once more, written independently: image by image, Python loops, float64 outside the nets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcar_fast.config import SamplingConfig
from dcar_fast.models.dcar import DCAR
from dcar_fast.noise import Noise


def gumbel(u: Tensor) -> Tensor:
    return -torch.log((-torch.log(u.double().clamp(min=1e-20))).clamp(min=1e-20))


def logits_scale(config: SamplingConfig, s: int) -> float | None:
    """w of the schedule at step s; None where the unconditional logits are not needed."""
    g, total = config.guidance_scale, config.num_steps
    if config.guidance_schedule == "power-cosine":
        return (g - 1) * (1 - math.cos(math.pi * (s / total) ** config.guidance_power)) / 2 + 1
    w = g if config.guidance_schedule == "constant" else g * s / total
    return None if w == 0 else w


def head_scale(config: SamplingConfig) -> float:
    if config.guidance_schedule == "power-cosine":
        return logits_scale(config, config.num_steps - 1)
    return 1.0 if config.guidance_scale == 0 else config.guidance_scale


def masked_after(config: SamplingConfig, s: int, total: int, masked_now: int) -> int:
    if masked_now == 0 or s == config.num_steps - 1:
        return 0
    planned = math.floor(total * math.acos((s + 1) / config.num_steps) * 2 / math.pi)
    return max(1, min(masked_now - 1, planned))


def kept(steps: int | str) -> list[int]:
    timesteps, start = [], 0
    counts = [int(part) for part in str(steps).split(",")]
    for section, count in enumerate(counts):
        size = 1000 // len(counts) + (section < 1000 % len(counts))
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += (size - 1) / (count - 1) if count > 1 else 1
        start += size
    return timesteps


def denoise(model: DCAR, cond: Tensor, uncond: Tensor | None, noise: Noise, b: int) -> Tensor:
    """Residuals (N, C) of image b from hidden states (N, D) each."""
    c, s = model.config, [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    betas = [min(1 - s[i + 1] / s[i], 0.999) for i in range(1000)]
    bars = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0).tolist()
    timesteps = kept(c.head_steps)
    scale, uncond = uncond if uncond is not None else (None, None)
    x = noise.latent_init()[b].double()

    def spread(k: int) -> float:
        now, before = bars[timesteps[k]], bars[timesteps[k - 1]]
        return (1 - now / before) * (1 - before) / (1 - now)

    for i, k in enumerate(range(len(timesteps) - 1, -1, -1)):
        t = torch.full((len(x),), timesteps[k])
        epsilon, v = model.head(x.float(), t, cond).double().chunk(2, dim=-1)
        if uncond is not None:
            other = model.head(x.float(), t, uncond).double().chunk(2, dim=-1)[0]
            epsilon = (1 + scale) * epsilon - scale * other
        now, before = bars[timesteps[k]], bars[timesteps[k - 1]] if k else 1.0
        beta = 1 - now / before
        x0 = ((x - math.sqrt(1 - now) * epsilon) / math.sqrt(now)).clamp(-1, 1)
        x = (beta * math.sqrt(before) * x0 + (1 - before) * math.sqrt(1 - beta) * x) / (1 - now)
        if k:
            f = (v + 1) / 2
            x = x + torch.exp((f * math.log(beta) + (1 - f) * math.log(spread(max(k, 1)))) / 2) * noise.latent(i)[b]
    return x * c.head_scale


@torch.no_grad()
def sample_image(
    model: DCAR,
    config: SamplingConfig,
    states: Tensor,
    mask: Tensor,
    noise: Noise,
    b: int,
    ids: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[list[list[int]], Tensor]:
    """Image b of a batch: its ids before every step and after the last, and its residuals (N, C)."""
    c = model.config
    count = c.num_tokens if grid is None else grid[0] * grid[1]
    current = [c.mask_id] * count if ids is None else ids[b].tolist()
    count, opened = len(current), current.count(c.mask_id)
    total = opened if config.schedule_tokens == "open" else count
    history, states, mask = [list(current)], states[b : b + 1], mask[b : b + 1]

    def run(unconditional: bool):
        out = model(torch.tensor([current]), states, mask, torch.tensor([unconditional]), grid)
        return out.logits[0].double(), out.hidden[0]

    for s in range(config.num_steps):
        left = 1 - (s + 1) / config.num_steps
        tau = config.temperature * left
        (c_logits, hidden), (u_logits, u_hidden) = run(False), run(True)
        w = logits_scale(config, s)
        if w is None:
            logits = c_logits
        elif config.guidance_schedule == "power-cosine":
            logits = u_logits + w * (c_logits - u_logits)
        else:
            logits = c_logits + w * (c_logits - u_logits)
        if config.anneal_softmax:
            logits = logits / (0.5 + 0.8 * left)
        was_open = [i for i in range(count) if current[i] == c.mask_id]
        noisy = logits + tau * gumbel(noise.token(s)[b])
        confidence = {}
        for i in was_open:
            current[i] = int(noisy[i].argmax())
            confidence[i] = logits[i, current[i]].item()
        n = masked_after(config, s, total, len(was_open))
        if n:
            fresh = gumbel(noise.confidence(s)[b])
            ranked = sorted((confidence[i] + tau * fresh[i].item(), i) for i in was_open)
            for _, i in ranked[:n]:
                current[i] = c.mask_id
        history.append(list(current))
    if config.final_forward:
        hidden, u_hidden = run(False)[1], run(True)[1]
    scale = head_scale(config)
    return history, denoise(model, hidden, None if scale == 1 else (scale, u_hidden), noise, b)
