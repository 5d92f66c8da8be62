"""One engine's stages on another's inputs, for the parity gate and the precision report.

Every probe takes a DCARPipeline of either engine. The fast sampler offers no stage alone, so its logits are those of a
traced run of one step from given ids, and its residuals those of a run of one step: they depend on the hidden states of
the last forward, which saw the given ids, and not on what that step samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcar_fast import DCARPipeline, FastSampler, Known, SamplingConfig
from dcar_fast.engine.decoder import FastDecoder
from dcar_fast.models.text_encoder import TextStates
from dcar_fast.noise import CounterNoise
from dcar_fast.reference.sample_from_logits import gumbel
from dcar_fast.sampling.schedules import Step

ONE_STEP = SamplingConfig(num_steps=1)


def text_of(states: Tensor, device: torch.device) -> TextStates:
    """States (B, T, Dt) of prompts that are all T tokens long."""
    mask = torch.ones(states.shape[:2], dtype=torch.bool, device=device)
    return TextStates(states.to(device), mask, (states.shape[1],) * len(states))


def logits_on(
    pipeline: DCARPipeline, states: Tensor, ids: Tensor, seeds: list[int], grid: tuple[int, int], rows: list[int]
) -> Tensor:
    """The raw logits (len(rows), N, V) of ids (B, N) after text states (B, T, Dt), float32 on the pipeline's device;
    rows: which of the 2 B, conditional ones first."""
    device, batch = pipeline.device, len(ids)
    text, ids = text_of(states, device), ids.to(device)
    if pipeline.engine == "fast":
        run = FastSampler(pipeline.generator, ONE_STEP, dtype=pipeline.sampler_dtype)
        sample = run(text.states, text.mask, seeds, known=Known(ids), grid=grid, trace=True, lengths=text.lengths)
        logits = sample.trace[0].logits
    else:
        unconditional = torch.arange(2 * batch, device=device) >= batch
        both = ids.repeat(2, 1), text.states.repeat(2, 1, 1), text.mask.repeat(2, 1)
        logits = pipeline.generator(*both, unconditional, grid).logits
    return logits[rows].float()


def residual_on(pipeline: DCARPipeline, states: Tensor, ids: Tensor, seeds: list[int], grid: tuple[int, int]) -> Tensor:
    """The residuals (B, N, C), float32 on the CPU, of a last step that sees ids (B, N)."""
    text = text_of(states, pipeline.device)
    return pipeline.generate(text, seeds, ONE_STEP, grid, known=Known(ids.to(pipeline.device))).residual.cpu()


def images_on(pipeline: DCARPipeline, ids: Tensor, residual: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) in about [-1, 1], float32 on the CPU, of ids (B, N) and residuals (B, N, C)."""
    decoder = FastDecoder(pipeline.tokenizer) if pipeline.engine == "fast" else pipeline.tokenizer
    tokens = ids.to(pipeline.device).unflatten(1, grid), residual.to(pipeline.device)
    return decoder.decode_tokens(*tokens).float().cpu()


def scores(logits: Tensor, step: Step, noise: Tensor) -> Tensor:
    """What the sampler takes the largest of: logits (2 P, N, V), [cond; uncond], and uniform noise (P, N, V) ->
    (P, N, V)."""
    cond, uncond = logits.chunk(2)
    guidance = step.guidance or 0.0
    return (cond + guidance * (cond - uncond)) / step.softmax_temperature + step.tau * gumbel(noise)


def token_noise(seeds: Sequence[int], tokens: int, size: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """The uniforms (B, N, V) that every sampler draws from these seeds."""
    shape = {"num_tokens": tokens, "codebook_size": size, "latent_channels": 1}
    return CounterNoise(list(seeds), **shape, device=device).token(step)


def psnr(a: Tensor, b: Tensor) -> float:
    """Of uint8 pixels (..., 3), in decibels; inf where they are equal."""
    error = (a.double() - b.double()).square().mean()
    return float("inf") if error == 0 else (10 * torch.log10(255**2 / error)).item()
