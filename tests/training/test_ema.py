"""The moving average against its formula, and the exchange of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcar_fast.training.ema import Averages, decay_at


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    module[2].requires_grad_(False)
    return module


def test_the_decay_is_warmed_up():
    assert [decay_at(0.99, n) for n in (0, 1, 8)] == [0.1, 2 / 11, 0.5]
    assert decay_at(0.99, 10_000) == 0.99 and decay_at(0.0, 5) == 0.0
    assert decay_at(0.5, 8) == 0.5 and decay_at(0.5, 9) == 0.5


def test_the_average_is_that_of_its_formula():
    module = make()
    averages = Averages({"m": module}, 0.3)
    expected = {k: p.detach().double().clone() for k, p in module.named_parameters() if p.requires_grad}
    for step in range(7):
        with torch.no_grad():
            for p in module.parameters():
                p += torch.randn_like(p)
        averages.update(step)
        for key, p in module.named_parameters():
            if p.requires_grad:
                d = min(0.3, (1 + step) / (10 + step))
                expected[key] = d * expected[key] + (1 - d) * p.detach().double()
    found = averages.full(keep=True)["m"]
    assert found.keys() == expected.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for key, value in found.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_swapping_is_undone_to_the_bit(fails):
    module = make()
    averages = Averages({"m": module}, 0.9)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.1)
    averages.update(0)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    mean = averages.full(keep=True)["m"]
    try:
        with averages.swapped():
            inside = {k: v.clone() for k, v in module.state_dict().items()}
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    for key, value in before.items():
        assert torch.equal(module.state_dict()[key], value)
        assert torch.equal(inside[key], mean.get(key, value))  # what has no average stays, buffers too
    assert not torch.equal(inside["0.weight"], before["0.weight"])
    assert all(torch.equal(v, mean[k]) for k, v in averages.full(keep=True)["m"].items())


def test_buffers_are_those_of_the_module():
    module = make()
    averages = Averages({"m": module}, 0.9)
    module(torch.randn(9, 3))
    with averages.swapped():
        assert module[1].num_batches_tracked == 1 and module[1].running_mean.abs().sum() > 0


def test_loading():
    module, other = make(), make(1)
    averages = Averages({"m": module}, 0.9)
    state = Averages({"m": other}, 0.9).full(keep=True)
    averages.load(state)
    assert all(torch.equal(v, state["m"][k]) for k, v in averages.full(keep=True)["m"].items())
    assert averages.full(keep=False) == {"m": {}}
    state["m"]["0.weight"].zero_()  # a copy was taken
    assert averages.averages["m"]["0.weight"].abs().sum() > 0
    for broken in ({}, {"m": {**state["m"], "extra": torch.zeros(1)}}, {"m": {**state["m"], "0.bias": torch.zeros(4)}}):
        with pytest.raises(ValueError, match="averages of 'm' are of other parameters"):
            averages.load(broken)


def test_averages_are_no_parameters_of_the_module():
    module = make()
    averages = Averages({"m": module}, 0.9)
    assert not any(a.requires_grad for a in averages.averages["m"].values())
    assert len(list(module.parameters())) == 6


def test_no_trained_parameters():
    module = make().requires_grad_(False)
    averages = Averages({"m": module}, 0.9)
    averages.update(0)
    with averages.swapped():
        pass
    assert averages.full(keep=True) == {"m": {}}
