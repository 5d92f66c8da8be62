"""kernels/remask.py in Triton's interpreter. It compares integers, so bfloat16 can be tested here too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import remask as kernels
from dcar_fast.reference.remask import remask as reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

MASK = 16384
INF, NAN = float("inf"), float("nan")
SPECIAL = [NAN, -INF, INF, 0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), NAN, 1.0]


def data(rows: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of random numbers, of few values, all equal, and of every special value; each with another count."""
    generator = torch.Generator().manual_seed(tokens)
    kinds = [
        torch.randn(tokens, generator=generator, dtype=torch.float64),
        torch.randint(-2, 3, (tokens,), generator=generator).double(),
        torch.ones(tokens, dtype=torch.float64),
        torch.tensor(SPECIAL, dtype=torch.float64).repeat(tokens // len(SPECIAL) + 1)[:tokens],
    ]
    confidence = torch.stack([kinds[row % len(kinds)] for row in range(rows)]).to(dtype)
    counts = torch.randint(0, tokens + 1, (rows,), generator=generator)
    counts[:3] = torch.tensor([0, tokens, 1])[:rows]
    return torch.randint(0, MASK, (rows, tokens), generator=generator), confidence, counts.roll(2)


# around the tile of 32 positions, and of 256 others walked over more than once
@pytest.mark.parametrize("dtype", kernels.BITS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (4, 33), (9, 70), (4, 256), (4, 257), (2, 600)])
def test_the_reference_agrees(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    ids, confidence, counts = data(*shape, dtype)
    assert torch.equal(kernels.remask(ids, confidence, counts, MASK), reference(ids, confidence, counts, MASK))


@pytest.mark.parametrize("config", [*kernels.TABLE.candidates, kernels.RULES[-1].config], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_configuration_gives_the_same(config, dtype: torch.dtype) -> None:
    for shape in ((8, 3), (4, 131)):
        ids, confidence, counts = data(*shape, dtype)
        got = kernels.remask(ids, confidence, counts, MASK, config=config)
        assert torch.equal(got, reference(ids, confidence, counts, MASK))


def test_float64_is_not_rounded() -> None:
    confidence = torch.tensor([[1.0, 1.0 - 2.0**-40, 1.0 + 2.0**-40]], dtype=torch.float64)
    assert kernels.remask(torch.tensor([[5, 6, 7]]), confidence, torch.tensor([1]), -9).tolist() == [[5, -9, 7]]


@pytest.mark.parametrize("mask_id", [-(2**63), -1, 0, 1, 2**63 - 1])
def test_any_mask_id(mask_id: int) -> None:
    ids = torch.tensor([[5, -(2**63), 2**63 - 1]])
    got = kernels.remask(ids, torch.tensor([[2.0, 3.0, 1.0]]), torch.tensor([2]), mask_id)
    assert got.tolist() == [[mask_id, -(2**63), mask_id]]


def test_counts_outside_the_row_are_the_nearest_inside() -> None:
    ids, confidence, _ = data(4, 10, torch.float32)
    got = kernels.remask(ids, confidence, torch.tensor([-1, 11, -(2**63), 2**40]), MASK)
    assert (got == MASK).sum(1).tolist() == [0, 10, 0, 10]


def test_strided_and_empty_inputs() -> None:
    ids, confidence, counts = data(6, 40, torch.float32)
    want = reference(ids, confidence, counts, MASK)
    both = torch.stack([counts, counts + 5], 1)
    got = kernels.remask(ids.T.contiguous().T, confidence.T.contiguous().T, both[:, 0], MASK)
    assert torch.equal(got, want) and got.is_contiguous()
    wide = torch.zeros(12, 120).copy_(confidence.repeat_interleave(2, 0).repeat_interleave(3, 1))
    assert torch.equal(kernels.remask(ids, wide[1::2, 2::3], counts, MASK), want)
    got = kernels.remask(ids[:1].expand(6, 40), confidence[:1].expand(6, 40), counts[2].expand(6), MASK)
    assert torch.equal(got, reference(ids[:1], confidence[:1], counts[2:3], MASK).expand(6, 40))
    assert kernels.remask(ids[:0], confidence[:0], counts[:0], MASK).shape == (0, 40)
    assert kernels.remask(ids[:, :0], confidence[:, :0], counts * 0, MASK).shape == (6, 0)


def test_long_rows_get_another_tile() -> None:
    configs = [kernels.TABLE.ship(90, tokens=tokens) for tokens in (1, 1024, 1025, 100_000)]
    assert configs == [kernels.tile(32, 256, 8)] * 2 + [kernels.tile(64, 64, 8)] * 2
