"""One training step of the full-size generator from cached tokens and text states, for training_memory.py."""

from __future__ import annotations

import time

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dcar_fast.config import preset
from dcar_fast.models.dcar import DCAR
from dcar_fast.training.generator_loss import GeneratorLoss, diffusion_draws
from dcar_fast.training.losses import random_token_mask, token_weight
from dcar_fast.training.optimizers import make_optimizer
from dcar_fast.training.settings import OptimizerSettings
from dcar_fast.training.task import Draws

PRESETS = {256: "dc-ar-256", 512: "dc-ar-512", 1024: "dc-ar-1024"}


def generator_step(size: int, batch: int = 1, prompt_tokens: int = 300) -> dict[str, float]:
    """AdamW and EMA in float32 on random tokens, residuals and text states; "seconds" of a step after the first, which
    makes the optimiser's state, "loss" and "parameters". size: pixels, 256, 512 or 1024."""
    torch.manual_seed(0)
    config = preset(PRESETS[size]).generator
    module = GeneratorLoss(DCAR(config)).train()
    settings = OptimizerSettings(learning_rate=2e-4, betas=(0.9, 0.96), weight_decay=0.03)
    optimizer = make_optimizer(module, settings)
    parameters = list(module.parameters())
    averages = [p.detach().clone() for p in parameters]
    update_averages = get_ema_multi_avg_fn(0.9999)
    tokens, channels = config.num_tokens, config.latent_channels
    seconds, loss = 0.0, torch.zeros(())
    for step in range(2):
        start = time.perf_counter()
        draws = Draws(0, step, batch, 0, batch)
        timesteps, noise = diffusion_draws(draws, config.head_batch_multiplier, tokens, channels)
        masked = random_token_mask(batch, tokens, draws.generator("mask"))
        values = module(
            ids=torch.randint(config.codebook_size, (batch, tokens)),
            residual=0.107 * torch.randn(batch, tokens, channels),
            text=torch.randn(batch, prompt_tokens, config.text_dim),
            text_mask=torch.ones(batch, prompt_tokens, dtype=torch.bool),
            masked=masked,
            dropped=torch.zeros(batch, dtype=torch.bool),
            timesteps=timesteps,
            noise=noise,
            total_weight=token_weight(masked, 0.1),
            total_masked=int(masked.sum()),
            share=1.0,
            label_smoothing=0.1,
            unmasked_weight=0.1,
        )
        loss = values["token_loss"] + values["diffusion_loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            update_averages(averages, parameters, step)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss": loss.item(), "parameters": sum(p.numel() for p in parameters)}
