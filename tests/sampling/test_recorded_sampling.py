"""The sampler against the recorded runs of the released one: every step's ids exactly, residuals to 1e-3."""

from __future__ import annotations

import pytest
import torch

from dcar_fast.models.diffusion_head import Dialect, sample_rows
from dcar_fast.reference.diffusion import diffusion_schedule
from dcar_fast.sampling import Known, ReferenceSampler
from dcar_fast.sampling.fast import FastSampler
from dcar_fast.sampling.schedules import head_guidance
from tests.golden_vectors import (
    INPAINTINGS,
    MODES,
    error,
    generator,
    recorded_noise,
    sampling_config,
    settings,
    text,
    vectors,
)


def check_steps(sample, case: str, steps: int) -> None:
    recorded = vectors("generator")
    assert len(sample.trace) == steps
    for s, step in enumerate(sample.trace):
        assert torch.equal(step.ids_in, recorded[f"{case}/step/{s}/ids_in"]), f"step {s}"
        if f"{case}/step/{s}/logits" in recorded:
            assert error(step.logits, recorded[f"{case}/step/{s}/logits"]) < 1e-4, f"step {s}"
    assert torch.equal(sample.ids, recorded[f"{case}/ids"])
    assert error(sample.residual, recorded[f"{case}/residual"]) < 1e-3
    assert sample.ids.dtype == torch.int64 and sample.residual.dtype == torch.float32


def fused(model, config=None) -> FastSampler:
    """On the ops that a GPU runs."""
    return FastSampler(model, config, backend="reference")


SAMPLERS = pytest.mark.parametrize("sampler", [ReferenceSampler, FastSampler, fused])


@SAMPLERS
@pytest.mark.parametrize("schedule_tokens", ["open", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_generation(mode, schedule_tokens, sampler):
    config = sampling_config(settings("generator")["generate"][mode], schedule_tokens=schedule_tokens)
    case = f"generate/{mode}"
    sample = sampler(generator(), config)(*text(), recorded_noise(case), trace=True)
    check_steps(sample, case, 6)
    silent = sampler(generator(), config)(*text(), recorded_noise(case))
    assert torch.equal(silent.ids, sample.ids) and error(silent.residual, sample.residual) < 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_head_guidance_is_the_recorded_one(mode):
    values = settings("generator")["generate"][mode]
    assert head_guidance(sampling_config(values)) == pytest.approx(
        values["head_guidance"], rel=1e-6
    )  # recorded in float32


@pytest.mark.parametrize("mode", MODES)
def test_head_on_the_recorded_hidden_states(mode):
    recorded, case = vectors("generator"), f"generate/{mode}"
    noise = recorded_noise(case)
    out = sample_rows(
        generator().head,
        recorded[f"{case}/head_condition"].flatten(0, 1),
        diffusion_schedule(32),
        noise.latent_init().flatten(0, 1),
        lambda i: noise.latent(i).flatten(0, 1),
        guidance=settings("generator")["generate"][mode]["head_guidance"],
        dialect=Dialect(scale=0.107),
    )
    assert error(out, recorded[f"{case}/residual"].flatten(0, 1)) < 1e-3


@SAMPLERS
@pytest.mark.parametrize("case", INPAINTINGS)
def test_inpainting(case, sampler):
    recorded, values = vectors("generator"), settings("generator")[case]
    states, mask = text()
    if "row" in values:
        states, mask = (t[values["row"] : values["row"] + 1] for t in (states, mask))
    keep, given = recorded[f"{case}/keep"], recorded[f"{case}/init_residual"]
    known = Known(recorded[f"{case}/init_ids"], given, keep)
    config = sampling_config(values, schedule_tokens="all")
    sample = sampler(generator(), config)(states, mask, recorded_noise(case), known=known, trace=True)
    check_steps(sample, case, 6)
    assert torch.equal(sample.residual[keep], given[keep]), "kept residuals come out bit-equal"
    decided = known.ids != 64
    assert torch.equal(sample.ids[decided], known.ids[decided])
    default = sampler(generator(), config)(states, mask, recorded_noise(case), known=Known(known.ids, given))
    if torch.equal(keep, decided):
        assert torch.equal(default.residual, sample.residual), "known residuals are kept by default"
    else:
        assert not torch.equal(default.residual, sample.residual)
        assert torch.equal(default.residual[decided], given[decided])
