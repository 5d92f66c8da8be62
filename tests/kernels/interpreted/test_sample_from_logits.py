"""kernels/sample_from_logits.py in Triton's interpreter. Float32 and float16: the interpreter's bfloat16 is wrong."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dcar_fast.kernels import sample_from_logits as kernels
from dcar_fast.noise import TokenNoise
from dcar_fast.reference.sample_from_logits import sample_from_logits as reference
from tests.ops.sampling_cases import SETTINGS, annealed, check_sample, chi_square, counters, draws, normals
from tests.tolerance import HALF_ULP

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def sample(cond, uncond, noise, config=None, **settings):
    if isinstance(noise, TokenNoise):
        drawn = {"uniforms": None, "seeds": noise.seeds, "tokens": noise.tokens, "step": noise.step}
    else:
        drawn = {"uniforms": noise, "seeds": None, "tokens": None, "step": 0}
    return kernels.sample_from_logits(cond, uncond, **{**SETTINGS, **settings}, **drawn, config=config)


def check(got, cond, uncond, noise, tau):
    logits = [annealed(cond, uncond, SETTINGS["guidance"], SETTINGS["softmax_temperature"], t) for t in (WIDE, PLAIN)]
    check_sample(got, *logits, noise, tau, 16 * HALF_ULP * 8 * cond.abs().max().item() / 0.8 if cond.numel() else 0.0)


WIDE, PLAIN = torch.float64, torch.float32


# around blocks of 1024 columns, and fewer columns than splits
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (0, 4), (3, 130), (2, 1023), (2, 1025), (2, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float64_agrees(shape, dtype):
    for guided, counted, tau in itertools.product((True, False), (True, False), (0.0, 0.7)):
        cond, uncond = normals(*shape, dtype=dtype), normals(*shape, seed=1, dtype=dtype) if guided else None
        noise = counters(shape[0]) if counted else draws(*shape, seed=2)
        check(sample(cond, uncond, noise, tau=tau), cond, uncond, noise, tau)


@pytest.mark.parametrize("config", kernels.TABLE.candidates, ids=str)
def test_every_configuration_draws_the_same(config):
    cond, uncond, noise = normals(3, 3000), normals(3, 3000, seed=1), counters(3)
    cond[1, 5:] = cond[1, 5]  # many near the best
    want = sample(cond, uncond, noise)
    assert all(map(torch.equal, sample(cond, uncond, noise, config), want))
    ties = torch.zeros(2, 3000)
    ties[1, :2100] = -1.0
    assert sample(ties, None, counters(2), config, tau=0.0)[0].tolist() == [0, 2100]


def test_blocks_that_are_passed_over_hold_no_winner():
    """Flat logits, where the noise alone decides and each block's bound comes close to the best so far."""
    cond, noise = 0.01 * normals(40, 4096), counters(40)
    settings = {"guidance": 0.0, "softmax_temperature": 1.0, "tau": 1.0}
    want = reference(cond, None, noise=noise, **settings)
    assert torch.equal(sample(cond, None, noise, kernels.tile(1024, 1, 4), **settings)[0], want[0])


def test_what_is_no_number_is_never_drawn():
    nan, inf = math.nan, math.inf
    rows = [[nan, 0.0, -1.0], [nan] * 3, [-inf] * 3, [-inf, -5.0, nan], [1.0, inf, inf], [nan, -inf, -inf]]
    rows = torch.tensor(rows).repeat_interleave(800, dim=1)  # 2400 columns: several blocks and splits
    for noise, tau in ((counters(6), 0.0), (counters(6), 1e-3), (draws(6, 2400), 1e-3)):
        ids, confidence = sample(rows, None, noise, tau=tau, guidance=0.0, softmax_temperature=1.0)
        want = reference(rows, None, noise=noise, tau=tau, guidance=0.0, softmax_temperature=1.0)
        assert torch.equal(ids, want[0]) and torch.equal(confidence, want[1])
        assert (ids // 800)[[0, 3, 4]].tolist() == [1, 1, 1] and ids[[1, 2, 5]].tolist() == [0, 0, 0]


def test_recorded_edges_are_safe():
    edges = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 0.5, 1.0]])
    ids, _ = sample(torch.zeros(3, 3), None, edges)
    assert ids.tolist() == [1, 0, 0], "u = 1 is the largest noise, and finite"
    foreign = torch.tensor([[math.nan, 2.0, -1.0]]).repeat(2, 700)
    ids, _ = sample(torch.zeros(2, 2100), None, foreign)
    assert ((ids >= 0) & (ids < 2100)).all()


@pytest.mark.parametrize("change", [{"softmax_temperature": 3e-38}, {"tau": 1e38}, {"guidance": 1e30}], ids=str)
def test_extreme_settings_are_the_references(change):
    cond, uncond, noise = normals(4, 700), normals(4, 700, seed=1), counters(4)
    settings = SETTINGS | change
    want, got = reference(cond, uncond, noise=noise, **settings), sample(cond, uncond, noise, **settings)
    assert torch.equal(got[0], want[0]) and torch.allclose(got[1], want[1], rtol=1e-6)


def test_strides_do_not_matter():
    cond, uncond, u = normals(4, 530), normals(4, 530, seed=1), draws(4, 530)
    want = sample(cond, uncond, u)
    wide = torch.cat([cond, cond + 1], 1)[:, :530]
    got = sample(wide, uncond.T.contiguous().T, u.T.contiguous().T)
    assert all(map(torch.equal, got, want))


def test_frequencies_are_the_softmax():
    rows, logits = 300, torch.tensor([0.0, 1.0, -0.5, 2.0])
    noise = TokenNoise(torch.zeros(rows, dtype=torch.int64), torch.arange(rows), 0)
    plain = {"guidance": 0.0, "softmax_temperature": 1.0, "tau": 1.0}
    ids, _ = sample(logits.expand(rows, 4), None, noise, **plain)
    assert chi_square(ids, logits) < 16.27  # 0.999 quantile, 3 degrees of freedom; the seeds are fixed


def test_the_default_type_does_not_matter(with_default_dtype):
    cond, uncond, noise = normals(3, 3000), normals(3, 3000, seed=1), counters(3)
    want = sample(cond, uncond, noise)
    got = with_default_dtype(lambda: sample(cond, uncond, noise))
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(got, want, strict=True))
