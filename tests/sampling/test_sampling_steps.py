"""Sampling of a token, re-masking: ties, NaN, infinities, every count, against plain Python."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dcar_fast.noise import CounterNoise, TokenNoise
from dcar_fast.reference.remask import remask
from dcar_fast.reference.sample_from_logits import gumbel, sample_from_logits

INF, NAN = math.inf, math.nan
MASK = 99


def test_gumbel_is_guarded_at_both_ends():
    u = torch.tensor([0.0, 1e-30, 0.25, 0.5, 1 - 2**-24, 1.0])
    expected = [-math.log(max(1e-20, -math.log(max(1e-20, v)))) for v in u.tolist()]
    assert gumbel(u).tolist() == pytest.approx(expected, rel=1e-5)
    assert gumbel(u).isfinite().all()


def plain_sample(cond, uncond, guidance, temperature, tau, uniforms):
    """One row in Python floats."""
    logits = []
    for i, c in enumerate(cond):
        value = c if uncond is None else c + guidance * (c - uncond[i])
        value /= temperature
        logits.append(-INF if math.isnan(value) else value)
    noisy = [v + tau * -math.log(max(1e-20, -math.log(max(1e-20, u)))) for v, u in zip(logits, uniforms, strict=True)]
    best = noisy.index(max(noisy))
    return (best, logits[best]) if logits[best] > -INF else (0, -INF)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("temperature", "tau"), [(1.0, 0.0), (0.5, 1.5), (1.3, 0.125)])
def test_sampling_in_plain_python(guided, temperature, tau):
    generator = torch.Generator().manual_seed(0)
    cond, uncond, u = (torch.rand(40, 17, generator=generator) for _ in range(3))
    cond, uncond = cond * 6 - 3, uncond * 6 - 3
    for row, value in enumerate((NAN, INF, -INF)):
        cond[row, 3 * row] = value
    uncond[5, 2], uncond[6, 4] = INF, NAN
    cond[7] = -INF
    cond[8] = NAN
    ids, confidence = sample_from_logits(
        cond,
        uncond if guided else None,
        guidance=2.5,
        softmax_temperature=temperature,
        tau=tau,
        noise=u,
    )
    assert ids.dtype == torch.int64 and confidence.dtype == torch.float32
    for row in range(40):
        other = uncond[row].tolist() if guided else None
        best, value = plain_sample(cond[row].tolist(), other, 2.5, temperature, tau, u[row].tolist())
        assert ids[row] == best, row
        assert confidence[row].item() == pytest.approx(value, rel=1e-5), row
    assert ids[7] == ids[8] == 0 and confidence[7] == confidence[8] == -INF


def test_confidence_has_no_noise_in_it():
    cond = torch.tensor([[0.0, 1.0, 2.0]])
    ids, confidence = sample_from_logits(
        cond, None, guidance=0.0, softmax_temperature=0.5, tau=3.0, noise=torch.tensor([[0.999999, 0.5, 0.5]])
    )
    assert ids.tolist() == [0] and confidence.tolist() == [0.0]


def test_ties_take_the_lowest_id():
    cond = torch.tensor([[1.0, 5.0, 5.0, 5.0], [2.0] * 4, [-INF] * 4, [0.0, -0.0, 0.0, -0.0], [-1.0, INF, INF, 0.0]])
    for u in (0.5, 0.0, 1.0):
        ids, _ = sample_from_logits(
            cond, None, guidance=1.0, softmax_temperature=1.0, tau=1.0, noise=torch.full((5, 4), u)
        )
        assert ids.tolist() == [1, 0, 0, 0, 1]


def test_guidance_without_unconditional_logits_is_ignored():
    cond, u = torch.randn(6, 9), torch.rand(6, 9)
    a = sample_from_logits(cond, None, guidance=7.0, softmax_temperature=0.9, tau=1.0, noise=u)
    b = sample_from_logits(cond, torch.randn(6, 9), guidance=0.0, softmax_temperature=0.9, tau=1.0, noise=u)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_low_precision_logits_are_sampled_in_float32():
    cond, uncond, u = torch.randn(8, 33), torch.randn(8, 33), torch.rand(8, 33)
    options = {"guidance": 4.5, "softmax_temperature": 0.7, "tau": 0.4, "noise": u}
    low = sample_from_logits(cond.bfloat16(), uncond.bfloat16(), **options)
    high = sample_from_logits(cond.bfloat16().float(), uncond.bfloat16().float(), **options)
    assert torch.equal(low[0], high[0]) and torch.equal(low[1], high[1])
    assert low[1].dtype == torch.float32


def test_token_noise_is_the_noise_of_its_rows():
    noise = CounterNoise([3, 2**40], num_tokens=5, codebook_size=13, latent_channels=4)
    cond = torch.randn(10, 13)
    options = {"guidance": 0.0, "softmax_temperature": 1.0, "tau": 1.5}
    seeds = torch.tensor([3, 2**40]).repeat_interleave(5)
    rows = TokenNoise(seeds, torch.arange(5).repeat(2), step=4)
    a = sample_from_logits(cond, None, **options, noise=rows)
    b = sample_from_logits(cond, None, **options, noise=noise.token(4).flatten(0, 1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_no_rows():
    empty = torch.zeros(0, 7)
    ids, confidence = sample_from_logits(empty, empty, guidance=1.0, softmax_temperature=1.0, tau=1.0, noise=empty)
    assert ids.shape == confidence.shape == (0,) and ids.dtype == torch.int64


def test_gumbel_max_samples_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    u = CounterNoise([1], num_tokens=40000, codebook_size=4, latent_channels=1).token(0)[0]
    ids, _ = sample_from_logits(logits.expand(40000, 4), None, guidance=0.0, softmax_temperature=1.0, tau=1.0, noise=u)
    expected = logits.softmax(0)
    spread = torch.sqrt(expected * (1 - expected) / 40000)
    assert ((ids.bincount(minlength=4) / 40000 - expected).abs() < 4 * spread).all()


# remask


def plain_remask(ids: list[int], confidence: list[float], n: int) -> list[int]:
    def key(i: int):
        return (not math.isnan(confidence[i]), 0.0 if math.isnan(confidence[i]) else confidence[i], i)

    chosen = set(sorted(range(len(ids)), key=key)[:n])
    return [MASK if i in chosen else token for i, token in enumerate(ids)]


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
def test_remask_every_count_in_plain_python(length):
    rng = random.Random(length)
    values = [-INF, -2.0, -0.0, 0.0, 1.0, 1.0, 3.5, INF, NAN, rng.gauss(0, 1), rng.gauss(0, 1)]
    confidence = [[rng.choice(values) for _ in range(length)] for _ in range(length + 1)]
    ids = torch.arange(length).expand(length + 1, length).contiguous()
    before = ids.clone()
    counts = torch.arange(length + 1)  # 0..N
    out = remask(ids, torch.tensor(confidence), counts, MASK)
    assert torch.equal(ids, before), "the input stays as it is"
    for row, n in enumerate(counts.tolist()):
        assert (out[row] == MASK).sum() == n
        assert out[row].tolist() == plain_remask(before[row].tolist(), confidence[row], n)


def test_remask_ties_go_by_index():
    ids, same = torch.arange(6)[None], torch.zeros(1, 6)
    assert remask(ids, same, torch.tensor([2]), MASK).tolist() == [[MASK, MASK, 2, 3, 4, 5]]
    signed = torch.tensor([[0.0, -0.0, 0.0, -0.0, 0.0, -0.0]])
    assert remask(ids, signed, torch.tensor([3]), MASK).tolist() == [[MASK, MASK, MASK, 3, 4, 5]]


def test_remask_order_of_the_special_values():
    confidence = torch.tensor([[INF, 1.0, -INF, NAN, -1.0, NAN]])
    order = [3, 5, 2, 4, 1, 0]
    for n in range(7):
        out = remask(torch.arange(6)[None], confidence, torch.tensor([n]), MASK)[0].tolist()
        assert [i for i in range(6) if out[i] == MASK] == sorted(order[:n])


def test_remask_long_rows_of_ties():
    confidence = torch.randint(0, 3, (2, 5000), generator=torch.Generator().manual_seed(0)).float()
    ids = torch.zeros(2, 5000, dtype=torch.int64)
    out = remask(ids, confidence, torch.tensor([2500, 1]), MASK)
    for row, n in enumerate((2500, 1)):
        assert out[row].tolist() == plain_remask([0] * 5000, confidence[row].tolist(), n)


def test_remask_of_low_precision_and_non_contiguous_rows():
    confidence = torch.randn(7, 4).t()
    ids = torch.arange(28).view(7, 4).t()
    out = remask(ids, confidence, torch.tensor([0, 3, 7, 5]), MASK)
    for row, n in enumerate([0, 3, 7, 5]):
        assert out[row].tolist() == plain_remask(ids[row].tolist(), confidence[row].tolist(), n)
