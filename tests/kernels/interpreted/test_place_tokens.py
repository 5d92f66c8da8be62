"""kernels/place_tokens.py in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dcar_fast.kernels import place_tokens as kernels
from dcar_fast.noise import ConfidenceNoise
from tests.ops.placing_cases import MASK, Case, cases, check, make

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def place(*inputs, noise, config=None, **settings):
    counted = isinstance(noise, ConfidenceNoise)
    drawn = {"uniforms": None if counted else noise, "seeds": noise.seeds if counted else None}
    return kernels.place_tokens(*inputs, **drawn, step=noise.step if counted else 0, config=config, **settings)


@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 64, 257])
def test_python_agrees(tokens: int) -> None:
    for case in cases((tokens,)):
        check(case.run(place), case)


@pytest.mark.parametrize("config", [*kernels.TABLE.candidates, kernels.RULES[-1].config], ids=str)
def test_every_configuration_gives_the_same(config) -> None:
    for noise in ("counter", "recorded", "last"):
        case = make(3, 131, "ties", scattered=True, noise=noise, tau=0.0)
        check(case.run(partial(place, config=config)), case)


def test_a_long_row() -> None:
    case = make(2, 5000, "random", scattered=True, noise="counter")
    check(case.run(place), case)


@pytest.mark.parametrize("mask_id", [-(2**63), -1, 0, 1, 2**63 - 1])
def test_any_mask_id(mask_id: int) -> None:
    ids, counts = torch.tensor([[mask_id, 17, mask_id]]), torch.tensor([1])
    settings = {"tau": 0.0, "noise": torch.full((1, 3), 0.5), "next_open": 2}
    got = place(ids, None, torch.tensor([[5, 6, 7]]), torch.tensor([[2.0, 0, 1]]), counts, mask_id, **settings)
    assert [x.tolist() for x in got] == [[[5, 17, mask_id]], [[2, 0]]]


def test_counts_outside_the_row_are_the_nearest_inside() -> None:
    ids, sampled = torch.full((4, 10), MASK), torch.arange(40).view(4, 10)
    counts = torch.tensor([-1, 11, 5 - 2**63, 2**40])
    settings = {"tau": 1.0, "noise": torch.rand(4, 10), "next_open": 10}
    new_ids, _ = place(ids, None, sampled, torch.randn(4, 10), counts, MASK, **settings)
    assert (new_ids == MASK).sum(1).tolist() == [0, 10, 0, 10]


def test_rows_outside_write_nothing() -> None:
    """The host does not look at them, the kernel does."""
    ids, rows = torch.full((2, 4), MASK), torch.tensor([[-1, 1], [4, 2**32]])
    got, _ = place(
        ids, rows, torch.full((2, 2), 5), torch.zeros(2, 2), torch.zeros(2), MASK, tau=0.0, noise=None, next_open=0
    )
    assert got.tolist() == [[MASK, 5, MASK, MASK], [MASK] * 4]


def test_strided_and_empty_inputs() -> None:
    case = make(4, 40, "ties", scattered=True, noise="recorded")
    moved = Case(*(x.T.contiguous().T for x in case[:4]), torch.stack([case.num_masked] * 2, 1)[:, 0], *case[5:])
    wide = moved._replace(rows=torch.cat((case.rows, case.rows), 1)[:, : case.rows.shape[1]])
    for other in (moved, wide):
        check(other.run(place), other)
    nothing = case._replace(**{name: getattr(case, name)[:0] for name in ("ids", "rows", "sampled", "confidence")})
    nothing = nothing._replace(num_masked=case.num_masked[:0], noise=case.noise[:0])
    assert [x.shape for x in nothing.run(place)] == [(0, 40), (0, case.next_open)]
    none_given = case._replace(**{name: getattr(case, name)[:, :0] for name in ("rows", "sampled", "confidence")})
    check(none_given.run(place), none_given)
