"""Studies of the sampler's settings: each variant draws the same held-out prompts from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from _reproduction.context import Context
from _reproduction.drawing import (
    Drawn,
    draw,
    median_seconds,
    noise_seeds,
    prompts_of,
    psnr_between,
    score,
    with_head_steps,
)
from _reproduction.spread import Finding
from _reproduction.study import SECONDS, SHAPES_EVAL, Measure, Outcome, Part, Study
from dcar_fast import DCARPipeline, SamplingConfig

STEPS = (2, 4, 6, 8, 12, 16, 24, 32)
GUIDANCE = (0.0, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0)
HEAD_STEPS = (4, 8, 16, 32, 64)
TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
POINTS = 2.0  # percentage points of ShapesEval by which a variant may be worse where the question is whether it is
CHANGED = 0.01  # a residual value counts as changed from this share of the residuals' standard deviation on


def steps_study() -> Study:
    names = {f"{steps}": SamplingConfig(num_steps=steps) for steps in STEPS}
    return Study(
        name="steps",
        title="Unmasking steps",
        question="The paper finds 12 steps to be the optimum (a figure without numbers).",
        note="Everything else as released. Found here means: no other number is better, and 2 and 32 are worse.",
        variants=tuple(names),
        parts=_sweep(names),
        measures=(SHAPES_EVAL,),
        findings=(Finding("12 steps are the optimum", "shapes_eval", "optimum", "12", ("2", "32")),),
        axis=lambda name: (float(name), ""),
        axis_label="steps",
    )


def guidance_study() -> Study:
    names = {f"{scale:g}": SamplingConfig(guidance_scale=scale) for scale in GUIDANCE}
    return Study(
        name="guidance",
        title="Classifier-free guidance",
        question="The paper samples with a scale of 4.5.",
        note="A scale of 1 leaves the diffusion head unguided, as in the released sampler; 0 guides nothing.",
        variants=tuple(names),
        parts=_sweep(names),
        measures=(SHAPES_EVAL,),
        findings=(Finding("4.5 is the optimum", "shapes_eval", "optimum", "4.5", ("0", "8")),),
        axis=lambda name: (float(name), ""),
        axis_label="guidance scale",
    )


def temperature_study() -> Study:
    names = {
        f"{temperature:g}, {'annealed' if annealed else 'plain'}": SamplingConfig(
            temperature=temperature, anneal_softmax=annealed
        )
        for annealed in (True, False)
        for temperature in TEMPERATURES
    }
    return Study(
        name="temperature",
        title="Gumbel temperature and annealing",
        question="Our own: does the released default, temperature 1.5 and annealed softmax, suit another model?",
        note="It does if no other pair is better, and both ends of its sweep and its twin without annealing are worse.",
        variants=tuple(names),
        parts=_sweep(names),
        measures=(SHAPES_EVAL,),
        findings=(
            Finding(
                "the released default is the optimum",
                "shapes_eval",
                "optimum",
                "1.5, annealed",
                ("0.5, annealed", "3, annealed", "1.5, plain"),
            ),
        ),
        axis=lambda name: (float(name.split(",")[0]), name.split(", ")[1]),
        axis_label="temperature",
    )


def _sweep(configs: dict[str, SamplingConfig]) -> dict[str, Part]:
    def one(name: str, sampling: SamplingConfig, context: Context, seed: int) -> Outcome:
        return {name: _score(context, seed, sampling)[0]}

    return {name: partial(one, name, sampling) for name, sampling in configs.items()}


def _score(
    context: Context, seed: int, sampling: SamplingConfig, pipeline: DCARPipeline | None = None
) -> tuple[dict[str, float], Drawn]:
    prompts = prompts_of(context.budget.prompts, seed)
    drawn = draw(pipeline or context.trained, [p.text for p in prompts], seed, sampling, context.budget.sampling_batch)
    return score(prompts, drawn.pixels), drawn


# ---- what conditions the diffusion head


def final_forward_study() -> Study:
    off, on = "off", "on"
    return Study(
        name="final-forward",
        title="One more forward for the diffusion head",
        question="The released sampler conditions the head on hidden states from before the last tokens were decided.",
        note=f"Both have the same tokens. Changed: by at least {CHANGED:g} of the residuals' standard deviation. "
        f"Nothing is lost if the rate falls by less than {POINTS:g} points.",
        variants=(off, on),
        parts={"both": _final_forward},
        measures=(
            SHAPES_EVAL,
            Measure("same_tokens", "same tokens, %", 2, None),
            Measure("changed_residuals", "changed residual values, %", 2, None),
            Measure("relative_change", "change, of the residuals' rms", 4, None),
            Measure("psnr_between", "PSNR between the two, dB", 2, None),
        ),
        findings=(Finding("nothing is lost without it", "shapes_eval", "not worse", off, (on,), tolerance=POINTS),),
    )


def _final_forward(context: Context, seed: int) -> Outcome:
    (off, without), (on, with_it) = (
        _score(context, seed, SamplingConfig(final_forward=forward)) for forward in (False, True)
    )
    change = (with_it.residual - without.residual).double()
    reference = without.residual.double()
    deviation, size = float(reference.std()), float(reference.square().mean().sqrt())
    on |= {
        "same_tokens": 100 * float((with_it.ids == without.ids).double().mean()),
        "changed_residuals": 100 * float((change.abs() >= CHANGED * deviation).double().mean()),
        "relative_change": float(change.square().mean().sqrt()) / size,
        "psnr_between": psnr_between(with_it.pixels, without.pixels),
    }
    return {"off": off, "on": on}


# ---- the head's denoising steps


def head_steps_study() -> Study:
    names = {f"{steps}": steps for steps in HEAD_STEPS}
    most = str(HEAD_STEPS[-1])

    def one(name: str, context: Context, seed: int) -> Outcome:
        rates, drawn = _score(context, seed, SamplingConfig(), with_head_steps(context.trained, names[name]))
        best = _most_steps(context, seed, drawn if name == most else None)
        difference = (drawn.residual - best.residual).double()
        rates["residual_difference"] = float(difference.square().mean().sqrt()) / _rms(best.residual)
        rates["psnr_to_most"] = psnr_between(drawn.pixels, best.pixels)
        return {name: rates}

    return Study(
        name="head-steps",
        title="Denoising steps of the diffusion head",
        question="The paper leaves open how many the head needs; the released model takes 32.",
        note="The same tokens and the same start; noise comes in with every step, so that other steps end elsewhere. "
        f"PSNR and difference are to {most} steps; equal pictures count with 100 dB. Times: of one batch, in turns. "
        f"Enough: the rate falls by less than {POINTS:g} points.",
        variants=tuple(names),
        parts={**{name: partial(one, name) for name in reversed(names)}, "times": _head_times},
        measures=(
            SHAPES_EVAL,
            Measure("psnr_to_most", f"PSNR to {most} steps, dB", 2, True),
            Measure("residual_difference", "difference, of the residuals' rms", 3, False),
            SECONDS,
        ),
        findings=(
            Finding("16 steps are enough", "shapes_eval", "not worse", "16", (most,), tolerance=POINTS),
            Finding("4 steps are enough", "shapes_eval", "not worse", "4", (most,), tolerance=POINTS),
            Finding("4 steps are faster than 32", "seconds_per_image", "better", "4", ("32",)),
        ),
        axis=lambda name: (float(name), ""),
        axis_label="denoising steps",
    )


def _most_steps(context: Context, seed: int, drawn: Drawn | None) -> Drawn:
    """What the most steps draw, kept from part to part; drawn again where a run continues behind it."""
    key = f"most head steps, seed {seed}"
    if drawn is None and key not in context.kept:
        _, drawn = _score(context, seed, SamplingConfig(), with_head_steps(context.trained, HEAD_STEPS[-1]))
    if drawn is not None:
        context.kept = {key: drawn}
    return context.kept[key]


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _head_times(context: Context, seed: int) -> Outcome:
    budget = context.budget
    prompts = [p.text for p in prompts_of(budget.prompts, seed)][: budget.sampling_batch]
    seeds = noise_seeds(seed, 0, len(prompts))

    def drawing(steps: int) -> Callable[[int], object]:
        pipeline = with_head_steps(context.trained, steps)
        grid = pipeline.grid(None, None)
        return lambda number: pipeline.decode(pipeline.generate(pipeline.encode_text(prompts), seeds, grid=grid), grid)

    times = median_seconds({f"{n}": drawing(n) for n in HEAD_STEPS}, context.device, budget.timed_rounds)
    return {name: {"seconds_per_image": seconds / len(prompts)} for name, seconds in times.items()}
