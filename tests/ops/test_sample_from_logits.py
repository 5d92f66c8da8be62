"""sample_from_logits: the formula spelled out, what is no number, ties, frequencies, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from dcar_fast import ops
from dcar_fast.noise import CounterNoise
from tests.ops.sampling_cases import SETTINGS, by_hand, draws, normals


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("rows, codes", [(1, 1), (5, 7), (3, 130), (0, 4)])
def test_sample_from_logits_is_the_formula(rows, codes, guided):
    cond, uncond = normals(rows, codes), normals(rows, codes, seed=1) if guided else None
    u = draws(rows, codes)
    ids, confidence = ops.sample_from_logits(cond, uncond, noise=u, **SETTINGS)
    expected_ids, expected = by_hand(cond, uncond, u, **SETTINGS)
    assert ids.dtype == torch.int64 and confidence.dtype == torch.float32
    assert ids.tolist() == expected_ids.tolist()
    assert torch.allclose(confidence.double(), expected.double(), atol=1e-5)


def test_what_is_no_number_is_never_drawn():
    nan, inf = math.nan, math.inf
    cond = torch.tensor([[nan, 0.0, -1.0], [nan] * 3, [-inf] * 3, [-inf, -5.0, nan], [1.0, inf, 2.0]])
    ids, confidence = ops.sample_from_logits(
        cond, None, guidance=0.0, softmax_temperature=1.0, tau=0.0, noise=draws(5, 3)
    )
    assert ids.tolist() == [1, 0, 0, 1, 1]
    assert confidence.tolist() == [0.0, -inf, -inf, -5.0, inf]


def test_ties_go_to_the_lowest_id_and_recorded_edges_are_safe():
    zeros = torch.zeros(2, 9)
    assert ops.sample_from_logits(zeros, zeros, noise=draws(2, 9), **(SETTINGS | {"tau": 0.0}))[0].tolist() == [0, 0]
    edges = torch.tensor([[0.0, 1.0, 0.5]])
    ids, _ = ops.sample_from_logits(torch.zeros(1, 3), None, noise=edges, **SETTINGS)
    assert ids.tolist() == [1], "u = 1 is the largest noise, and finite"


def test_frequencies_are_the_softmax():
    logits = torch.tensor([0.0, 1.0, -0.5, 2.0])
    rows = 200_000
    cond = logits.expand(rows, 4)
    ids, _ = ops.sample_from_logits(cond, None, guidance=0.0, softmax_temperature=1.0, tau=1.0, noise=draws(rows, 4))
    expected = logits.softmax(0) * rows
    chi_square = ((torch.bincount(ids, minlength=4) - expected).square() / expected).sum()
    assert chi_square < 16.27  # 0.999 quantile, 3 degrees of freedom; the seed is fixed


def test_token_noise_is_the_counter_noise_of_the_rows():
    whole = CounterNoise([5, 2**63 - 1], num_tokens=6, codebook_size=11, latent_channels=4).token(3)
    rows = [(0, 2), (1, 5), (1, 0), (0, 0)]
    seeds = torch.tensor([[5, 2**63 - 1][b] for b, _ in rows])
    noise = ops.TokenNoise(seeds, torch.tensor([t for _, t in rows]), 3)
    cond, uncond = normals(4, 11), normals(4, 11, seed=1)
    counted = ops.sample_from_logits(cond, uncond, noise=noise, **SETTINGS)
    given = ops.sample_from_logits(cond, uncond, noise=torch.stack([whole[b, t] for b, t in rows]), **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(counted, given, strict=True))


COND = torch.zeros(2, 6)


def _sample(cond=COND, uncond=None, noise=None, **settings):
    noise = torch.zeros(2, 6) if noise is None else noise
    ops.sample_from_logits(cond, uncond, noise=noise, **(SETTINGS | settings))


BAD = [
    ("cond", lambda: _sample(cond=COND.long())),
    ("cond", lambda: _sample(cond=COND[0])),
    ("cond", lambda: _sample(cond=torch.zeros(2, 0), noise=torch.zeros(2, 0))),
    ("cond", lambda: _sample(cond=[[0.0]])),
    ("uncond", lambda: _sample(uncond=COND[:1])),
    ("guidance", lambda: _sample(guidance=math.nan)),
    ("guidance", lambda: _sample(guidance=torch.tensor(1.0))),
    ("softmax_temperature", lambda: _sample(softmax_temperature=0.0)),
    ("softmax_temperature", lambda: _sample(softmax_temperature=math.inf)),
    ("tau", lambda: _sample(tau=-0.1)),
    ("tau", lambda: _sample(tau=None)),
    ("noise", lambda: _sample(noise=torch.zeros(2, 5))),
    ("noise", lambda: _sample(noise=torch.zeros(2, 6).long())),
    ("noise", lambda: _sample(noise=ops.TokenNoise(torch.zeros(1).long(), torch.zeros(2).long(), 0))),
]


@pytest.mark.parametrize("name, call", BAD)
def test_bad_input_names_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        call()
