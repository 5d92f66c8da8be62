"""Hybrid against discrete-only: reconstruction, generation, time; the small model and the full size."""

from __future__ import annotations

import torch
from _work import Workload

from _reproduction import paper
from _reproduction.context import Context, random_model
from _reproduction.drawing import (
    decode_codes,
    draw,
    drawing_times,
    median_seconds,
    noise_seeds,
    prompts_of,
    score,
)
from _reproduction.spread import Finding
from _reproduction.study import SECONDS, SHAPES_EVAL, Measure, Outcome, Study
from dcar_fast import SamplingConfig
from dcar_fast.evaluation.metrics import evaluate_reconstruction
from dcar_fast.evaluation.pictures import held_out_shapes

HYBRID, DISCRETE = "hybrid", "discrete"
PROMPT_TOKENS = 64  # of the full size's prompts, as in latency.py and throughput.py
PSNR = Measure("psnr", "PSNR, dB", 2, True)
SSIM = Measure("ssim", "SSIM", 4, True)
RATE = Measure("images_per_second", "images/s", 4, True)
PICTURES_AT_ONCE = 16  # that are reconstructed


def hybrid_study() -> Study:
    return Study(
        name="hybrid",
        title="Hybrid against discrete-only",
        question="The paper's residuals improve reconstruction and generation and cost a tenth of the throughput.",
        note="Reconstructions are of held-out pictures. Discrete-only generation has the same tokens, decoded without "
        "residuals; its time is without the diffusion head.",
        variants=(HYBRID, DISCRETE),
        parts={"reconstruction": _reconstruction, "generation": _generation, "times": _times},
        measures=(PSNR, SSIM, SHAPES_EVAL, SECONDS, RATE),
        findings=(
            Finding("hybrid reconstructs better (PSNR)", "psnr", "better", HYBRID, (DISCRETE,)),
            Finding("hybrid reconstructs better (SSIM)", "ssim", "better", HYBRID, (DISCRETE,)),
            Finding("hybrid generates better", "shapes_eval", "better", HYBRID, (DISCRETE,)),
            Finding("discrete-only is faster", "seconds_per_image", "better", DISCRETE, (HYBRID,)),
        ),
        paper=paper.HYBRID,
    )


def _reconstruction(context: Context, seed: int) -> Outcome:
    config = context.config
    pictures = held_out_shapes(config.image_size, PICTURES_AT_ONCE, context.budget.prompts, seed)
    found = evaluate_reconstruction(context.trained.tokenizer, pictures)
    return {path: dict(found[path]) for path in (HYBRID, DISCRETE)}


def _generation(context: Context, seed: int) -> Outcome:
    prompts, batch = prompts_of(context.budget.prompts, seed), context.budget.sampling_batch
    drawn = draw(context.trained, [p.text for p in prompts], seed, SamplingConfig(), batch)
    return {
        HYBRID: score(prompts, drawn.pixels),
        DISCRETE: score(prompts, decode_codes(context.trained, drawn, batch)),
    }


def _times(context: Context, seed: int) -> Outcome:
    prompts = [p.text for p in prompts_of(context.budget.prompts, seed)][: context.budget.sampling_batch]
    calls = drawing_times(context.trained, lambda number: (prompts, noise_seeds(seed, 0, len(prompts))))
    times = median_seconds(calls, context.device, context.budget.timed_rounds)
    return {name: _per_image(seconds, len(prompts)) for name, seconds in times.items()}


def _per_image(seconds: float, images: int) -> dict[str, float]:
    return {"seconds_per_image": seconds / images, "images_per_second": images / seconds}


# ---- the full size


def full_size_study() -> Study:
    return Study(
        name="full-size",
        title="Throughput of the full size",
        question="The paper draws 11.4 images/s without residuals and 10.3 with them.",
        note="512 px with random weights, a prompt of 64 tokens: on a CPU one image at a time in float32 and one round "
        "per seed, on a GPU 16 in float16, ten rounds. With --quick the small preset stands in for the full size.",
        variants=(HYBRID, DISCRETE),
        parts={"times": _full_size},
        measures=(
            SECONDS,
            RATE,
            Measure("batch", "batch", 0, None),
            Measure("parameters_millions", "parameters, millions", 1, None),
        ),
        findings=(Finding("discrete-only is faster", "seconds_per_image", "better", DISCRETE, (HYBRID,)),),
        paper=paper.FULL_SIZE,
        trained=False,
    )


def _full_size(context: Context, seed: int) -> Outcome:
    on_cpu, name = context.device.type == "cpu", context.budget.full_size_preset
    batch, rounds, warmup = (1, 1, 0) if on_cpu else (16, 10, 2)
    if name not in context.kept:
        warmup = max(warmup, 1)  # the weights are packed in the first call
        dtype = torch.float32 if on_cpu else torch.float16
        context.kept = {name: random_model(name, context.device, dtype)}
    pipeline = context.kept[name]
    work = Workload(name, batch, 0, 0, SamplingConfig().num_steps, PROMPT_TOKENS, str(context.device))

    def prompts_and_seeds(number: int) -> tuple[list[str], list[int]]:
        return work.prompts(1000 * seed + number), work.seeds(1000 * seed + number)

    times = median_seconds(drawing_times(pipeline, prompts_and_seeds), context.device, rounds, warmup)
    parts = (pipeline.tokenizer, pipeline.generator, pipeline.text_encoder)
    size = sum(p.numel() for part in parts for p in part.parameters()) / 1e6
    facts = {"batch": batch, "parameters_millions": size}
    return {name: _per_image(seconds, batch) | facts for name, seconds in times.items()}
