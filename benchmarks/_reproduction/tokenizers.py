"""Studies of tokenizers: the stages of their training, and another resolution than that of their training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from _reproduction import paper
from _reproduction.context import Context
from _reproduction.spread import Finding
from _reproduction.study import Measure, Outcome, Study
from _reproduction.trainings import finish, run_settings
from dcar_fast.checkpoints import load_tokenizer
from dcar_fast.evaluation.metrics import MOST_PSNR, PATHS, evaluate_reconstruction, psnr, ssim
from dcar_fast.evaluation.pictures import held_out_shapes
from dcar_fast.images import tensor_to_pixels
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.ops.vq_lookup import vq_lookup
from dcar_fast.training.settings import DataSettings, OptimizerSettings, TokenizerTraining

PICTURES_AT_ONCE = 16  # that are reconstructed
QUALITY = (
    Measure("hybrid_psnr", "hybrid PSNR, dB", 2, True),
    Measure("hybrid_ssim", "hybrid SSIM", 4, True),
    Measure("discrete_psnr", "discrete PSNR, dB", 2, True),
    Measure("discrete_ssim", "discrete SSIM", 4, True),
)

# ---- the stages

TWO, JOINT, THREE = paper.STAGES["rFID"]
# shares of the steps: a stage is what is trained, "mixed" is the discrete stage with a path of its own per picture
STAGES = {
    TWO: (("discrete", 0.7), ("alternate", 0.3)),
    JOINT: (("continuous", 0.15), ("mixed", 0.85)),
    THREE: (("continuous", 0.15), ("discrete", 0.55), ("alternate", 0.3)),
}
RATES = {"continuous": 2e-3, "discrete": 2e-3, "mixed": 2e-3, "alternate": 1e-3}


def stages_study() -> Study:
    return Study(
        name="stages",
        title="Training the tokenizer in three stages",
        question="The paper's three stages, the last one for the decoder alone, beat both shorter ways in both paths.",
        note="Equal steps in all: " + "; ".join(f"{name}: {_shares(name)}" for name in STAGES) + ". MSE, no "
        "discriminator, no perceptual loss; equal warm-ups are trained once. Scores are of held-out pictures.",
        variants=(TWO, JOINT, THREE),
        parts={name: partial(_train_stages, name) for name in STAGES},
        measures=(
            *QUALITY,
            Measure("codebook_usage", "codes used, %", 1, None),
            Measure("steps", "steps", 0, None),
            Measure("training_seconds", "training, s", 0, None),
        ),
        findings=tuple(
            Finding(f"three stages reconstruct best, {path} path", f"{path}_psnr", "better", THREE, (TWO, JOINT))
            for path in ("discrete", "hybrid")
        ),
        paper=paper.STAGES,
    )


def _shares(name: str) -> str:
    return ", ".join(f"{stage} {share:.0%}" for stage, share in STAGES[name])


def stage_steps(name: str, total: int) -> list[tuple[str, int]]:
    """The stages of a variant and their steps, at least one each, ``total`` in all."""
    stages = [(stage, max(1, round(share * total))) for stage, share in STAGES[name]]
    longest = max(range(len(stages)), key=lambda i: stages[i][1])
    rest = total - sum(steps for i, (_, steps) in enumerate(stages) if i != longest)
    return [(stage, rest if i == longest else steps) for i, (stage, steps) in enumerate(stages)]


def _train_stages(name: str, context: Context, seed: int) -> Outcome:
    model, chain, steps, seconds = "", f"stages-seed{seed}", 0, 0.0
    for stage, count in stage_steps(name, context.budget.stages_steps):
        chain += f"-{stage}"  # what begins with the same stages of equal steps shares them
        done = finish(_stage_settings(context, chain, stage, count, seed, model), mixed_paths=stage == "mixed")
        model, steps, seconds = done["model"], steps + done["steps"], seconds + done["seconds"]
    tokenizer = load_tokenizer(model).float().to(context.device)
    found = reconstruction(tokenizer, context.config.image_size, context.budget.prompts, seed)
    return {name: found | {"steps": steps, "training_seconds": seconds}}


def _stage_settings(context: Context, name: str, stage: str, steps: int, seed: int, initial: str) -> TokenizerTraining:
    budget, rate = context.budget, RATES[stage]
    trained = "discrete" if stage == "mixed" else stage
    return TokenizerTraining(
        run=run_settings(context, name, seed, steps, budget.stages_batch, ema=0.995),
        data=DataSettings(size=context.config.image_size, workers=budget.workers, seed=seed),
        optimizer=OptimizerSettings(
            learning_rate=rate, final_learning_rate=rate / 100, warmup_steps=min(100, steps // 5), weight_decay=1e-4
        ),
        model=context.config.tokenizer,
        stage=trained,
        initial=initial,
        lpips_weight=0.0,
        codebook_init="data" if trained == "discrete" else "random",
        restart_dead_codes_after=200 if trained == "discrete" else 0,
        residual_std_examples=64,
        preview_examples=0,
    )


def reconstruction(tokenizer: DCHT, size: int, count: int, seed: int) -> dict[str, float]:
    """PSNR and SSIM of both paths and the codes' use in percent, on held-out pictures of ``size`` pixels."""
    tokenizer.quantizer.lookup = vq_lookup
    found = evaluate_reconstruction(tokenizer, held_out_shapes(size, PICTURES_AT_ONCE, count, seed))
    scores = {f"{path}_{metric}": value for path in PATHS for metric, value in found[path].items()}
    return scores | {"codebook_usage": 100 * found["codebook"]["usage"]}


# ---- another resolution

SAME, TWICE, ENLARGED = "as trained", "twice the size", "as trained, then enlarged"
LOSS = 1.0  # dB that the larger size may cost


def resolution_study() -> Study:
    return Study(
        name="resolution",
        title="A tokenizer at another resolution",
        question="The paper's 2-D tokenizer serves resolutions that it was not trained at.",
        note="The model's tokenizer, at its own size and at twice that, on the same held-out scenes, drawn at that "
        f"size. It serves the larger size if PSNR falls by less than {LOSS:g} dB, and has to beat the small picture "
        "enlarged (bicubic).",
        variants=(SAME, TWICE, ENLARGED),
        parts={SAME: partial(_at_size, SAME, 1), TWICE: partial(_at_size, TWICE, 2), ENLARGED: _enlarged},
        measures=(*QUALITY, Measure("pixels", "side, px", 0, None)),
        findings=tuple(
            finding
            for path in PATHS
            for finding in (
                Finding(f"{path} PSNR does not fall", f"{path}_psnr", "not worse", TWICE, (SAME,), tolerance=LOSS),
                Finding(f"{path}: better than enlarging", f"{path}_psnr", "better", TWICE, (ENLARGED,)),
            )
        ),
    )


def _at_size(name: str, times: int, context: Context, seed: int) -> Outcome:
    size = times * context.config.image_size
    found = reconstruction(context.trained.tokenizer, size, context.budget.prompts, seed)
    return {name: found | {"pixels": size}}


@torch.no_grad()
def _enlarged(context: Context, seed: int) -> Outcome:
    size, count = context.config.image_size, context.budget.prompts
    sums = dict.fromkeys((measure.name for measure in QUALITY), 0.0)
    for small, large in _pairs(size, count, seed):
        tokens = context.trained.tokenizer.encode(small.to(context.device).float() / 127.5 - 1)
        for path, latents in zip(PATHS, (tokens.features, tokens.quantized), strict=True):
            made = context.trained.tokenizer.decode(latents).float().clamp(-1, 1)
            made = F.interpolate(made, scale_factor=2, mode="bicubic", align_corners=False)
            pixels = tensor_to_pixels(made).permute(0, 3, 1, 2).contiguous().cpu()
            sums[f"{path}_psnr"] += float(psnr(pixels, large).double().clamp(max=MOST_PSNR).sum())
            sums[f"{path}_ssim"] += float(ssim(pixels, large).double().sum())
    return {ENLARGED: {name: total / count for name, total in sums.items()} | {"pixels": 2 * size}}


def _pairs(size: int, count: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same scenes at the model's size and at twice that."""
    yield from zip(*(held_out_shapes(s, PICTURES_AT_ONCE, count, seed) for s in (size, 2 * size)), strict=True)
