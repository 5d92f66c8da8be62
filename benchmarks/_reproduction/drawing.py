"""Pictures for held-out prompts, what ShapesEval says of them, and times."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from _session import synchronize
from torch import Tensor

from dcar_fast import DCARPipeline, SamplingConfig
from dcar_fast.evaluation.metrics import MOST_PSNR, psnr
from dcar_fast.evaluation.shapes_eval import judge_pictures
from dcar_fast.profiling import stage
from dcar_fast.sampling import Sample, fast
from dcar_fast.sampling._fast_run import FastRun
from dcar_fast.training.shapes import Prompt, held_out_prompts

SEEDS_APART = 100_000  # of the noise of two seeds of the benchmark; there are at most 1200 prompts


@dataclass(frozen=True)
class Drawn:
    """What was drawn for a list of prompts: pixels (N, H, W, 3) uint8, ids (N, T) int64 and residual (N, T, C)."""

    pixels: Tensor
    ids: Tensor
    residual: Tensor


def prompts_of(count: int, seed: int) -> list[Prompt]:
    """The held-out prompts of a seed, the same for all variants."""
    return held_out_prompts(count, seed)


def noise_seeds(seed: int, start: int, count: int) -> list[int]:
    """Of pictures ``start``, ... of a seed."""
    return [SEEDS_APART * seed + i for i in range(start, start + count)]


def draw(pipeline: DCARPipeline, prompts: list[str], seed: int, sampling: SamplingConfig, batch: int) -> Drawn:
    """One picture per prompt, with residuals, at the model's own size."""
    grid = pipeline.grid(None, None)
    found = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        sample = pipeline.generate(pipeline.encode_text(part), noise_seeds(seed, start, len(part)), sampling, grid)
        found.append((pipeline.decode(sample, grid), sample.ids, sample.residual))
    return Drawn(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))


def decode_codes(pipeline: DCARPipeline, drawn: Drawn, batch: int) -> Tensor:
    """The same tokens without their residuals: pixels (N, H, W, 3) uint8."""
    grid, found = pipeline.grid(None, None), []
    for ids, residual in zip(drawn.ids.split(batch), drawn.residual.split(batch), strict=True):
        sample = Sample(ids.to(pipeline.device), torch.zeros_like(residual).to(pipeline.device))
        found.append(pipeline.decode(sample, grid).cpu())
    return torch.cat(found)


def score(prompts: list[Prompt], pixels: Tensor) -> dict[str, float]:
    """ShapesEval in percent, overall ("shapes_eval") and by category ("shapes_eval, counting")."""
    report = judge_pictures(prompts, (picture.numpy() for picture in pixels))
    rates = {f"shapes_eval, {name}": found.rate for name, found in report.categories.items()}
    return {name: 100 * rate for name, rate in {"shapes_eval": report.overall.rate, **rates}.items()}


def psnr_between(pixels: Tensor, references: Tensor) -> float:
    """Mean PSNR in dB of (N, H, W, 3) uint8 pictures, a pair of equal ones counting with 100."""
    pair = [p.permute(0, 3, 1, 2).contiguous() for p in (pixels, references)]
    return float(psnr(*pair).double().clamp(max=MOST_PSNR).mean())


def with_head_steps(pipeline: DCARPipeline, steps: int) -> DCARPipeline:
    """The same weights with another number of denoising steps."""
    return _twin(pipeline, head_steps=steps)


def codes_alone(pipeline: DCARPipeline) -> DCARPipeline:
    """The same weights in an object of its own, to sample in :func:`without_head`: what is packed and captured for one
    generator is not taken for another's. On a CPU nothing is captured, and the weights need not be packed twice."""
    return _twin(pipeline) if pipeline.device.type != "cpu" else pipeline


def _twin(pipeline: DCARPipeline, **changes) -> DCARPipeline:
    generator = copy.copy(pipeline.generator)  # its tensors are shared
    generator.config = replace(generator.config, **changes)
    return DCARPipeline(pipeline.tokenizer, generator, pipeline.text_encoder, trained=pipeline.trained)


class CodesRun(FastRun):
    """A call of the fast sampler that ends with the tokens: no diffusion head, and nothing that it alone looks at."""

    def __call__(self) -> Sample:
        for step in self.request.plan:
            with stage("unmask", step.index):
                self.step(step)
        shape = (*self.ids.shape, self.request.model.latent_channels)
        return Sample(self.ids, torch.zeros(shape, device=self.ids.device))


@contextmanager
def without_head() -> Iterator[None]:
    """The fast sampler leaves out the diffusion head inside the block; sample with ``codes_sampling``."""
    before = fast.FastRun
    fast.FastRun = CodesRun
    try:
        yield
    finally:
        fast.FastRun = before


def codes_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """The same tokens; the head's own look at the tokens is no part of the last step, and :class:`CodesRun` leaves it
    out."""
    return replace(sampling, final_forward=True)


def drawing_times(pipeline: DCARPipeline, batch: Callable[[int], tuple[list[str], list[int]]]) -> dict[str, Callable]:
    """ "hybrid" and "discrete": functions that draw batch number ``i``, prompts and seeds, from text to pixels."""
    grid, alone, sampling = pipeline.grid(None, None), codes_alone(pipeline), SamplingConfig()

    def hybrid(number: int) -> Sample:
        prompts, seeds = batch(number)
        sample = pipeline.generate(pipeline.encode_text(prompts), seeds, sampling, grid)
        pipeline.decode(sample, grid)
        return sample

    def discrete(number: int) -> Sample:
        prompts, seeds = batch(number)
        with without_head():
            sample = alone.generate(alone.encode_text(prompts), seeds, codes_sampling(sampling), grid)
        alone.decode(sample, grid)
        return sample

    return {"hybrid": hybrid, "discrete": discrete}


def median_seconds(
    calls: Mapping[str, Callable[[int], object]], device: torch.device, rounds: int, warmup: int = 1
) -> dict[str, float]:
    """Medians over ``rounds`` calls, given the round's number; the calls take turns, and who is first changes."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize(device)
            start = time.perf_counter()
            calls[name](max(number, 0))
            synchronize(device)
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}
