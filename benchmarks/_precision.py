"""The comparisons of precision.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from _probes import ONE_STEP, images_on, logits_on, psnr, scores, text_of, token_noise
from _weights import load
from _work import Workload
from torch import Tensor

from dcar_fast import DCARPipeline, FastSampler, Known, ReferenceSampler, Sample, SamplingConfig
from dcar_fast.engine.choice import Choice
from dcar_fast.images import tensor_to_pixels
from dcar_fast.models.text_encoder import TextStates
from dcar_fast.noise import TokenNoise
from dcar_fast.ops._dispatch import float8_usable
from dcar_fast.sampling.schedules import Step, plan


class Runner:
    """A pipeline in one precision. dtype: the samplers' own, None for the pipeline's. backend: theirs."""

    def __init__(
        self, pipeline: DCARPipeline, grid: tuple[int, int], dtype: torch.dtype | None = None, backend: str = "auto"
    ) -> None:
        self.pipeline, self.grid, self.dtype, self.backend = pipeline, grid, dtype, backend

    def sample(
        self, text: TextStates, seeds: list[int], sampling: SamplingConfig, known: Known | None = None, trace=False
    ) -> Sample:
        """A run of the row's sampler."""
        options = {"grid": self.grid, "known": known, "trace": trace}
        if self.pipeline.engine == "reference":
            return ReferenceSampler(self.pipeline.generator, sampling)(text.states, text.mask, seeds, **options)
        sampler = FastSampler(self.pipeline.generator, sampling, self.backend, self.dtype)
        return sampler(text.states, text.mask, seeds, lengths=text.lengths, **options)

    def choose(self, states: Tensor, ids: Tensor, seeds: list[int], step: Step) -> Tensor:
        """What the row samples at every position (B, N) of ids (B, N) after text states (B, T, Dt) in ``step``."""
        c, device, (batch, tokens) = self.pipeline.generator.config, self.pipeline.device, ids.shape
        if self.pipeline.engine == "reference":
            logits = logits_on(self.pipeline, states, ids, seeds, self.grid, list(range(2 * batch)))
            noise = token_noise(seeds, tokens, c.codebook_size, step.index, device)
            return scores(logits, step, noise).argmax(dim=-1).cpu()
        engine = Choice(self.pipeline.generator, self.backend, self.dtype).engine(prefix=True)
        text = text_of(states, device)
        texts = engine.read(text.states, text.mask)
        cond, uncond = engine.hidden(ids.to(device), self.grid, texts, True).chunk(2)
        positions = torch.arange(tokens, device=device).repeat(batch)
        sampled, _ = engine.choose(
            cond.flatten(0, 1),
            None if step.guidance is None else uncond.flatten(0, 1),
            guidance=step.guidance or 0.0,
            softmax_temperature=step.softmax_temperature,
            tau=step.tau,
            noise=TokenNoise(torch.tensor(seeds, device=device).repeat_interleave(tokens), positions, step.index),
        )
        return sampled.view(batch, tokens).cpu()

    def residual(self, states: Tensor, ids: Tensor, seeds: list[int]) -> Tensor:
        """(B, N, C) on the CPU, of a last step that sees ids (B, N)."""
        known = Known(ids.to(self.pipeline.device))
        return self.sample(text_of(states, self.pipeline.device), seeds, ONE_STEP, known).residual.cpu()

    def pixels(self, ids: Tensor, residual: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 on the CPU."""
        return tensor_to_pixels(images_on(self.pipeline, ids, residual, self.grid))


class Reference:
    """What the float32 reference does with the prompts and seeds of a run; tensors on the CPU."""

    @torch.no_grad()
    def __init__(self, folder: str, work: Workload, grid: tuple[int, int], run: int) -> None:
        self.folder, self.work, self.grid = folder, work, grid
        self.prompts, self.seeds = work.prompts(run), work.seeds(run)
        self.sampling = SamplingConfig(num_steps=work.steps)
        pipeline = load(folder, "float32", "reference", work.device)
        self.trained = pipeline.trained
        runner = Runner(pipeline, grid)
        text = pipeline.encode_text(self.prompts)
        self.states, self.mask_id = text.states.cpu(), pipeline.generator.config.mask_id
        self.ids_in: list[Tensor] = []
        sample = self._sample(pipeline, text)
        self.ids, residual = sample.ids.cpu(), sample.residual.cpu()
        self.chosen = [
            runner.choose(self.states, ids, self.seeds, step)
            for ids, step in zip(self.ids_in, plan(self.sampling), strict=True)
        ]
        self.decoded = residual
        self.residual = runner.residual(self.states, self.ids_in[-1], self.seeds)
        self.pixels = runner.pixels(self.ids, residual)

    def _sample(self, pipeline: DCARPipeline, text: TextStates) -> Sample:
        """The whole run; every step's input ids are kept, its logits, hundreds of megabytes, are not."""
        generator, seen = pipeline.generator, self.ids_in
        hook = generator.register_forward_pre_hook(lambda _, args: seen.append(args[0][: len(self.seeds)].cpu()))
        try:
            run = ReferenceSampler(generator, self.sampling)
            return run(text.states, text.mask, self.seeds, grid=self.grid)
        finally:
            hook.remove()


@torch.no_grad()
def compare(reference: Reference, kind: str, dtype: str) -> dict[str, Any]:
    """A row's numbers. "emulated": why fp8 is, on a device without it, else None. "step_agreement": by step, of the
    open tokens. PSNR None: equal."""
    engine = "fast" if kind == "fast" else "reference"
    base, override = ("bfloat16", torch.float8_e4m3fn) if dtype == "fp8" else (dtype, None)
    pipeline = load(reference.folder, base, engine, reference.work.device)
    usable = float8_usable(pipeline.device)
    emulated = usable.reason if dtype == "fp8" and not usable.ok else None
    runner = Runner(pipeline, reference.grid, override, "auto" if emulated is None else "reference")
    seeds = reference.seeds
    agreement = []
    for ids, wanted, step in zip(reference.ids_in, reference.chosen, plan(reference.sampling), strict=True):
        is_open = ids == reference.mask_id
        same = runner.choose(reference.states, ids, seeds, step) == wanted
        agreement.append(same[is_open].double().mean().item())
    free = runner.sample(pipeline.encode_text(reference.prompts), seeds, reference.sampling)
    error = (runner.residual(reference.states, reference.ids_in[-1], seeds) - reference.residual).double()
    rms = error.square().mean().sqrt().item()
    return {
        "dtype": dtype,
        "emulated": emulated,
        "step_agreement": agreement,
        "free_agreement": (free.ids.cpu() == reference.ids).double().mean().item(),
        "residual": {
            "max": error.abs().max().item(),
            "rms": rms,
            "relative": rms / reference.residual.double().square().mean().sqrt().item(),
        },
        "psnr_tokens": finite(psnr(runner.pixels(reference.ids, reference.decoded), reference.pixels)),
        "psnr_free": finite(psnr(runner.pixels(free.ids, free.residual), reference.pixels)),
    }


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
