"""What changes from step to step, against the published numbers and the formulas."""

from __future__ import annotations

import math

import pytest

from dcar_fast.config import SamplingConfig
from dcar_fast.sampling.schedules import guidance_weight, head_guidance, masked_counts, plan
from tests.sampling import oracle

PUBLISHED = [242, 228, 214, 200, 185, 170, 154, 137, 117, 95, 67, 0]


def counts(num_tokens: int, opened: int, **options) -> list[int]:
    return masked_counts(SamplingConfig(**options), num_tokens)[:, opened].tolist()


def test_published_counts():
    assert counts(256, 256) == PUBLISHED == counts(256, 256, schedule_tokens="all")
    assert counts(1024, 256) == PUBLISHED, "open tokens count, not the grid"


@pytest.mark.parametrize("schedule_tokens", ["open", "all"])
@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (1, 5), (16, 6), (15, 12), (20, 1), (7, 30), (64, 12), (12, 2)])
def test_counts_of_every_row(schedule_tokens, tokens, steps):
    config = SamplingConfig(num_steps=steps, schedule_tokens=schedule_tokens)
    table = masked_counts(config, tokens)
    assert table.shape == (steps, tokens + 1)
    for opened in range(tokens + 1):
        masked, expected = opened, []
        for s in range(steps):
            masked = oracle.masked_after(config, s, opened if schedule_tokens == "open" else tokens, masked)
            expected.append(masked)
        assert table[:, opened].tolist() == expected
        if opened:
            assert all(1 <= n < max(opened, 2) for n in expected[:-1]) and expected[-1] == 0
            for before, after in zip(expected, expected[1:], strict=False):
                assert after < before or after == before == 1
        else:
            assert not any(expected), "nothing open stays untouched"


def test_one_step_masks_nothing():
    assert counts(16, 16, num_steps=1) == [0]


def test_open_and_all_differ_for_few_open_tokens():
    assert counts(16, 3, num_steps=6) == [2, 1, 1, 1, 1, 0]
    assert counts(256, 128, schedule_tokens="all") == [127, 126, 125, 124, 123, 122, 121, 120, 117, 95, 67, 0]
    assert counts(256, 128) == [121, 114, 107, 100, 92, 85, 77, 68, 58, 47, 33, 0]


def test_plan_of_twelve_steps():
    steps = plan(SamplingConfig())
    assert [step.index for step in steps] == list(range(12))
    for s, step in enumerate(steps):
        r = (s + 1) / 12
        assert step.softmax_temperature == pytest.approx(0.5 + 0.8 * (1 - r), rel=1e-12)
        assert step.tau == pytest.approx(1.5 * (1 - r), abs=1e-12)
        assert step.guidance == 4.5
    assert steps[-1].tau == 0 and steps[-1].softmax_temperature == 0.5
    plain = plan(SamplingConfig(anneal_softmax=False, temperature=0.0))
    assert {step.softmax_temperature for step in plain} == {1.0} and {step.tau for step in plain} == {0.0}
    only = plan(SamplingConfig(num_steps=1))
    assert (only[0].tau, only[0].softmax_temperature) == (0.0, 0.5)


def test_constant_guidance():
    assert {guidance_weight(SamplingConfig(guidance_scale=3.0), s) for s in range(12)} == {3.0}
    assert guidance_weight(SamplingConfig(guidance_scale=0), 3) is None
    assert head_guidance(SamplingConfig(guidance_scale=3.0)) == 3.0
    assert head_guidance(SamplingConfig(guidance_scale=0)) == 1.0, "0 is no guidance, which the head calls 1"
    assert guidance_weight(SamplingConfig(guidance_scale=1.0), 0) == 1.0, "1 still guides the logits,"
    assert head_guidance(SamplingConfig(guidance_scale=1.0)) == 1.0, "but not the residuals"


def test_linear_guidance():
    config = SamplingConfig(guidance_schedule="linear", num_steps=5, guidance_scale=2.0)
    assert guidance_weight(config, 0) is None, "no unconditional pass in step 0"
    assert [guidance_weight(config, s) for s in range(1, 5)] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert head_guidance(config) == 2.0, "the plain scale, not the last step's"
    assert guidance_weight(SamplingConfig(guidance_schedule="linear", num_steps=1), 0) is None
    assert head_guidance(SamplingConfig(guidance_schedule="linear", num_steps=1)) == 4.5
    assert all(
        guidance_weight(SamplingConfig(guidance_schedule="linear", guidance_scale=0), s) is None for s in range(12)
    )


@pytest.mark.parametrize("power", [2.5, 1.0, 0.5])
def test_power_cosine_guidance(power):
    config = SamplingConfig(guidance_schedule="power-cosine", num_steps=8, guidance_scale=6.0, guidance_power=power)
    for s in range(8):
        w = 5.0 * (1 - math.cos(math.pi * (s / 8) ** power)) / 2 + 1
        # u + w (c - u) = c + (w - 1)(c - u)
        assert guidance_weight(config, s) == pytest.approx(w - 1, rel=1e-12, abs=1e-12)
    assert head_guidance(config) == pytest.approx(w, rel=1e-12)
    assert head_guidance(SamplingConfig(guidance_schedule="power-cosine", num_steps=1)) == 1.0
    one = SamplingConfig(guidance_schedule="power-cosine", guidance_scale=1.0)
    assert head_guidance(one) == 1.0 and guidance_weight(one, 7) == 0.0
