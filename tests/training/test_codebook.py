"""Counting codes, replacing them, and what a tokenizer's codes are worth."""

from __future__ import annotations

import math

import pytest
import torch

from dcar_fast.config import DCHTConfig
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.reference.vq_lookup import vq_lookup
from dcar_fast.training.codebook import (
    WINDOW,
    CodebookUsage,
    codebook_statistics,
    merge_codes,
    perplexity,
    replace_codes,
)


def tiny() -> DCHT:
    torch.manual_seed(0)
    return DCHT(
        DCHTConfig(
            codebook_size=12, latent_channels=4, widths=(8, 8), encoder_depths=(0, 1), decoder_depths=(0, 1),
            blocks=("res", "res"), decoder_norms=("batch_norm",) * 2, decoder_acts=("relu",) * 2,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("weights", "expected"), [([1, 1, 1, 1], 4), ([5, 0, 0], 1), ([0, 0], 0), ([1, 1, 0, 2], 2 * math.sqrt(2))])  # fmt: skip  # noqa: E501
def test_perplexity(weights, expected):
    assert perplexity(torch.tensor(weights)).item() == pytest.approx(expected)


def test_usage_counts_the_last_hundred_steps():
    usage = CodebookUsage(4)
    first = usage.update(torch.tensor([3, 1, 0, 0]), 0)
    assert [first[name].item() for name in ("codebook_usage", "dead_codes")] == [0.5, 2]
    assert first["codebook_perplexity"].item() == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    for step in range(1, WINDOW):
        last = usage.update(torch.tensor([1, 0, 0, 0]), step)
    assert last["dead_codes"] == 2  # step 0 is the hundredth last
    assert usage.update(torch.tensor([1, 0, 0, 0]), WINDOW)["dead_codes"] == 3
    assert usage.update(torch.zeros(4, dtype=torch.int64), WINDOW + 1)["codebook_usage"] == 0.25


def test_unused_codes():
    usage = CodebookUsage(4)
    usage.update(torch.tensor([1, 0, 0, 2]), 0)
    usage.update(torch.tensor([1, 0, 1, 0]), 1)
    assert usage.unused(2, 1).tolist() == [1, 3] and usage.unused(2, 2).tolist() == [1]
    usage.mark(torch.tensor([1]), 2)
    assert usage.unused(2, 2).tolist() == []


def test_usage_survives_a_checkpoint():
    usage, other = CodebookUsage(3), CodebookUsage(3)
    usage.update(torch.tensor([1, 2, 0]), 4)
    other.load_state_dict({name: tensor.clone() for name, tensor in usage.state_dict().items()})
    counts = torch.tensor([0, 1, 1])
    assert usage.update(counts, 5) == other.update(counts, 5)


def test_replaced_codes_are_features_and_forget_their_moments():
    weight = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = torch.optim.AdamW([weight], weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    features = torch.nn.functional.normalize(torch.randn(7, 3), dim=1)
    ids = torch.tensor([1, 4])
    generator = torch.Generator().manual_seed(1)
    assert replace_codes(weight, ids, features, optimizer, generator, length=0.5).tolist() == [1, 4]
    for row in weight[ids]:
        assert (row - 0.5 * features).abs().amax(dim=1).min() == 0
    assert not torch.equal(weight[1], weight[4])
    kept = torch.tensor([0, 2, 3])
    assert torch.equal(weight[kept], before[kept])
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[weight][name]
        assert (moment[ids] == 0).all() and (moment[kept] != 0).all()


def test_no_more_codes_than_features_are_replaced():
    weight = torch.nn.Parameter(torch.zeros(5, 2))
    optimizer = torch.optim.AdamW([weight])
    features = torch.eye(2)
    done = replace_codes(weight, torch.tensor([0, 2, 3]), features, optimizer, torch.Generator().manual_seed(0))
    assert done.tolist() == [0, 2] and (weight[3] == 0).all()
    assert sorted(weight[done].argmax(dim=1).tolist()) == [0, 1]


def test_statistics_are_those_of_all_batches_together():
    model = tiny().train()
    model.encoder.eval()
    pictures = torch.rand(5, 3, 8, 8) * 2 - 1
    found = codebook_statistics(model, [pictures[:2], pictures[2:]])
    tokens = model.eval().encode(pictures)
    ids = tokens.ids.unique()
    assert found["tokens"] == tokens.ids.numel() and found["dead_codes"] == 12 - len(ids)
    assert found["usage"] == pytest.approx(len(ids) / 12)
    assert found["residual_std"] == pytest.approx(tokens.residual.double().std(correction=0).item(), rel=1e-6)


def test_statistics_leave_the_modes_as_they_were():
    model = tiny().train()
    model.encoder.eval()
    codebook_statistics(model, [torch.zeros(1, 3, 8, 8)])
    assert model.decoder.training and model.training and not model.encoder.training


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        codebook_statistics(tiny(), [])


# ---- merging


def test_codes_that_point_the_same_way_become_one():
    generator = torch.Generator().manual_seed(0)
    far = torch.nn.functional.normalize(torch.randn(5, 16, generator=generator), dim=1)
    near = far[[3, 0, 3]] + 0.01 * torch.randn(3, 16, generator=generator)
    weight = torch.cat((far, near)) * torch.linspace(0.5, 2, 8)[:, None]
    before = weight.clone()
    assert merge_codes(weight, 0.98) == 5
    assert torch.equal(weight[[1, 2, 4]], before[[1, 2, 4]])  # what is far from all others stays, bit by bit
    assert torch.equal(weight[3], weight[5]) and torch.equal(weight[3], weight[7]) and torch.equal(weight[0], weight[6])
    directions = torch.nn.functional.normalize(before, dim=1)
    mean = torch.nn.functional.normalize(directions[[3, 5, 7]].mean(dim=0), dim=0)
    assert torch.allclose(torch.nn.functional.normalize(weight[3], dim=0), mean, atol=1e-6)
    ids, _, _ = vq_lookup(before, weight)
    assert ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 3]  # the lowest of equal codes
    assert merge_codes(weight, 0.98) == 5 and merge_codes(before.clone(), 0.9999999) == 8


def test_a_chain_of_codes_stops_where_the_means_are_apart():
    angles = torch.arange(0, 1.2, 0.1)
    weight = torch.stack((angles.cos(), angles.sin()), dim=1)
    left = merge_codes(weight, math.cos(0.15))
    directions = torch.unique(weight.round(decimals=5), dim=0)
    assert len(directions) == left < len(angles)
    cosines = torch.nn.functional.normalize(directions, dim=1) @ torch.nn.functional.normalize(directions, dim=1).T
    assert cosines.fill_diagonal_(-1).max() < math.cos(0.15) + 1e-4


def test_all_codes_may_become_one():
    weight = torch.ones(4, 3)
    assert merge_codes(weight, 0.5) == 1 and torch.equal(weight, torch.ones(4, 3))
