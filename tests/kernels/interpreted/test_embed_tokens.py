"""kernels/embed_tokens.py in Triton's interpreter. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import embed_tokens as kernels
from dcar_fast.kernels.configs import Config
from tests.ops.moment_cases import check_moments

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def data(images: int, tokens: int, entries: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    return [
        torch.randint(0, entries, (images, tokens), generator=generator),
        (torch.randn(entries, width, generator=generator) + 5).to(dtype),
        torch.randn(tokens, width, generator=generator).to(dtype),
    ]


def check(ids: Tensor, table: Tensor, positions: Tensor, config: Config | None = None) -> None:
    """The sum is exact up to its rounding; the moments are those of the rounded sum."""
    x, moments = kernels.embed_tokens(ids, table, positions, config)
    assert torch.equal(x, (table[ids].double() + positions.double()).to(table.dtype))
    check_moments(moments, x)


# around pieces of 64 columns, tiles of 128, and of 4 rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 7, 5), (3, 4, 9, 64), (1, 9, 5, 65), (2, 5, 30, 128), (2, 6, 4, 300)]
)
def test_float64_agrees(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*data(*shape, dtype))


@pytest.mark.parametrize("config", [*kernels.TABLE.candidates, kernels.RULES[-1].config], ids=str)
def test_every_configuration_gives_the_same(config: Config) -> None:
    check(*data(2, 9, 20, 200), config)


def test_foreign_ids_become_nan() -> None:
    ids, table, positions = data(2, 6, 9, 70)
    ids[0, 1], ids[1, 5], ids[1, 0] = -1, 9, 2**40
    x, moments = kernels.embed_tokens(ids, table, positions)
    foreign = (ids < 0) | (ids >= 9)
    assert x[foreign].isnan().all() and x[~foreign].isfinite().all()
    assert moments[foreign].isnan().all() and moments[~foreign].isfinite().all()


def test_strided_and_empty_inputs() -> None:
    ids, table, positions = data(2, 6, 9, 70)
    want = kernels.embed_tokens(ids, table, positions)
    got = kernels.embed_tokens(ids.T.contiguous().T, table.T.contiguous().T, positions.T.contiguous().T)
    assert all(map(torch.equal, got, want))
    for images, tokens in ((0, 6), (2, 0)):
        x, moments = kernels.embed_tokens(torch.ones(images, tokens, dtype=torch.int64), table, positions[:tokens])
        assert x.shape == (images, tokens, 70) and moments.shape == (images, tokens, 2, 2)
