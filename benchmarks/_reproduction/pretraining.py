"""Low resolution first, then a short fine-tuning, against training at the high resolution from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from _report import note
from torch import Tensor

from _reproduction import paper
from _reproduction.context import Context
from _reproduction.drawing import draw, prompts_of, score
from _reproduction.spread import Finding
from _reproduction.study import SHAPES_EVAL, Measure, Outcome, Study
from _reproduction.trainings import finish, run_settings
from dcar_fast import DCARPipeline, SamplingConfig, flops
from dcar_fast.config import DCARConfig
from dcar_fast.training.cache import make_cache
from dcar_fast.training.cache_settings import CacheSettings
from dcar_fast.training.generator import encode_images
from dcar_fast.training.losses import random_token_mask, token_loss
from dcar_fast.training.settings import DataSettings, GeneratorModel, GeneratorTraining, OptimizerSettings
from dcar_fast.training.shapes import ShapesSource

LOW_FIRST, SCRATCH = paper.PRETRAINING["GPU-hours"]
RATE, FINE_RATE = 1.6e-3, 8e-4
BACKWARD = 2  # times the FLOPs of the forward
DATA_SEED = 1  # of the cached pictures, which all trainings share
VARIETY = "few"  # of the pictures, as in the recipe shapes-generator: learnt sooner
CAPTIONS = 256  # by which the text's length is measured
AT_ONCE = 16  # held-out pictures whose loss is computed together


def pretraining_study() -> Study:
    return Study(
        name="pretraining",
        title="Low resolution first",
        question="The paper's generator, trained at 256 px and fine-tuned at 512, is better than one trained at 512 "
        "from scratch, with about half the GPU-hours.",
        note="The model's generator, new weights, at the model's own size and at twice that (four times the tokens). "
        "Compute is equal in FLOPs, three times those of the forward; both take tokens of the model's tokenizer from "
        "the same cached pictures. Token loss: cross-entropy of masked tokens on held-out pictures at the large size.",
        variants=(LOW_FIRST, SCRATCH),
        parts={LOW_FIRST: _low_first, SCRATCH: _scratch},
        measures=(
            Measure("token_loss", "held-out token loss", 3, False),
            SHAPES_EVAL,
            Measure("teraflop", "training, TFLOP", 1, None),
            Measure("training_seconds", "training, s", 0, None),
            Measure("steps", "steps", 0, None),
        ),
        findings=(
            Finding("low resolution first predicts better", "token_loss", "better", LOW_FIRST, (SCRATCH,)),
            Finding("low resolution first generates better", "shapes_eval", "better", LOW_FIRST, (SCRATCH,)),
        ),
        paper=paper.PRETRAINING,
    )


def _low_first(context: Context, seed: int) -> Outcome:
    low, high, budget = generator_config(context, 1), generator_config(context, 2), context.budget
    steps = ((low, budget.pretraining_steps), (high, budget.finetuning_steps))
    first = _trained(context, f"pretraining-seed{seed}-low", low, budget.pretraining_steps, seed)
    second = _trained(
        context, f"pretraining-seed{seed}-low-high", high, budget.finetuning_steps, seed, str(first["model"])
    )
    cost = sum(count * step_flops(context, config) for config, count in steps)
    return {LOW_FIRST: _judged(context, second["model"], seed) | _cost((first, second), cost)}


def _scratch(context: Context, seed: int) -> Outcome:
    high, steps = generator_config(context, 2), steps_from_scratch(context)
    done = _trained(context, f"pretraining-seed{seed}-high", high, steps, seed)
    return {SCRATCH: _judged(context, done["model"], seed) | _cost((done,), steps * step_flops(context, high))}


def _cost(trainings: tuple[dict, ...], cost: float) -> dict[str, float]:
    names = {"training_seconds": "seconds", "steps": "steps"}
    return {"teraflop": cost / 1e12} | {name: sum(t[key] for t in trainings) for name, key in names.items()}


def generator_config(context: Context, times: int) -> DCARConfig:
    """The model's generator for pictures of so many times its size."""
    config = context.config.generator
    return replace(config, num_tokens=config.num_tokens * times**2)


def steps_from_scratch(context: Context) -> int:
    """At the large size, for the FLOPs of the pre-training and the fine-tuning together."""
    low, high = (step_flops(context, generator_config(context, times)) for times in (1, 2))
    budget = context.budget
    return max(1, round((budget.pretraining_steps * low + budget.finetuning_steps * high) / high))


def step_flops(context: Context, config: DCARConfig) -> float:
    """FLOPs of one training step of generator and text encoder, captions of the mean length."""
    rows, tokens = context.budget.generator_batch, config.num_tokens
    key = "caption tokens"
    if key not in context.kept:
        source = ShapesSource(16, DATA_SEED)
        lengths = context.trained.text_encoder.count_tokens([source.example(i).caption for i in range(CAPTIONS)])
        context.kept[key] = round(sum(lengths) / len(lengths))
    length = context.kept[key]
    forward = [
        *flops.text_encoder(context.config.text, rows, length),
        *flops.text_projection(config, rows, length),
        *flops.trunk(config, rows, tokens, length),
        *flops.logits(config, rows, tokens),
        *flops.diffusion_head(config, rows * tokens * config.head_batch_multiplier),
    ]
    return float((1 + BACKWARD) * flops.flops(forward))


def _trained(
    context: Context, name: str, config: DCARConfig, steps: int, seed: int, initial: str = ""
) -> dict[str, object]:
    """A generator on the cache of its resolution; ``initial``: the pipeline that it goes on from."""
    budget, rate = context.budget, FINE_RATE if initial else RATE
    warmup = min(20 if initial else 100, steps // 5)
    settings = GeneratorTraining(
        run=run_settings(context, name, seed, steps, budget.generator_batch, ema=0.99),
        data=DataSettings(
            kind="cache",
            path=_cache(context, config),
            size=config.grid[0] * context.config.tokenizer.compression,
            workers=budget.workers,
            seed=seed,
        ),
        optimizer=OptimizerSettings(
            learning_rate=rate, betas=(0.9, 0.96), weight_decay=0.03, warmup_steps=warmup, final_learning_rate=1e-5
        ),
        tokenizer=str(context.model),
        model=GeneratorModel(config, context.config.text),
        initial=initial,
        label_smoothing=0.05,
        unmasked_weight=0.1,
    )
    return finish(settings)


def _cache(context: Context, config: DCARConfig) -> str:
    """The folder of the training pictures' tokens at the generator's resolution; made once."""
    size = config.grid[0] * context.config.tokenizer.compression
    key, folder = f"cache {size}", context.store.training(f"cache-{size}px")
    if key not in context.kept:
        note(f"encoding {context.budget.cached_pictures} pictures of {size} px")
        make_cache(
            CacheSettings(
                output=str(folder),
                tokenizer=str(context.model),
                data=DataSettings(size=size, workers=context.budget.workers, seed=DATA_SEED, variety=VARIETY),
                examples=context.budget.cached_pictures,
                batch_size=min(32, context.budget.cached_pictures),
                residual_dtype="float16",
                device=str(context.device),
            )
        )
        context.kept[key] = str(folder)
    return context.kept[key]


def _judged(context: Context, model: object, seed: int) -> dict[str, float]:
    pipeline = DCARPipeline.from_pretrained(str(model), device=context.device)
    prompts = prompts_of(context.budget.prompts, seed)
    drawn = draw(pipeline, [p.text for p in prompts], seed, SamplingConfig(), context.budget.sampling_batch)
    return {"token_loss": held_out_loss(pipeline, context.budget.prompts, seed)} | score(prompts, drawn.pixels)


@torch.no_grad()
def held_out_loss(pipeline: DCARPipeline, count: int, seed: int) -> float:
    """Mean cross-entropy (nats) of masked tokens of ``count`` held-out pictures at the pipeline's size, with captions;
    the masks, drawn as in training, depend on the seed alone."""
    generator, total, masked_tokens = torch.Generator().manual_seed(seed), 0.0, 0
    for images, captions in _held_out(pipeline.config.image_size, count, seed):
        ids = encode_images(pipeline.tokenizer, images, pipeline.device)[0].flatten(1)
        masked = random_token_mask(*ids.shape, generator).to(pipeline.device)
        text = pipeline.text_encoder(captions)
        shown = ids.masked_fill(masked, pipeline.generator.config.mask_id)
        dropped = torch.zeros(len(ids), dtype=torch.bool, device=pipeline.device)
        logits = pipeline.generator(shown, text.states, text.mask, dropped).logits
        number = int(masked.sum())
        total, masked_tokens = total + number * float(token_loss(logits, ids, masked)), masked_tokens + number
    return total / masked_tokens


def _held_out(size: int, count: int, seed: int) -> Iterator[tuple[Tensor, list[str]]]:
    source = ShapesSource(size, seed, held_out=True, variety=VARIETY)
    for start in range(0, count, AT_ONCE):
        examples = [source.example(i) for i in range(start, min(start + AT_ONCE, count))]
        pixels = torch.stack([torch.from_numpy(example.image) for example in examples])
        yield pixels.permute(0, 3, 1, 2).contiguous(), [example.caption for example in examples]
