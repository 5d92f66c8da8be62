"""kernels/cross_attention.py in Triton's interpreter. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import _attention
from dcar_fast.kernels.cross_attention import TABLE, cross_attention
from dcar_fast.reference.cross_attention import cross_attention as reference
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def data(
    keys: int, head: int, dtype: torch.dtype = torch.float32, queries: int = 5, heads: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four rows with all, half, one and no keys; what is to be ignored is NaN or infinite."""
    generator = torch.Generator().manual_seed(keys * 1000 + head)
    q = torch.randn(4, queries, heads, head, generator=generator).to(dtype)
    k, v = (torch.randn(4, keys, heads, head, generator=generator).to(dtype) for _ in range(2))
    lengths = torch.tensor([keys, (keys + 1) // 2, 1, 0])
    for row, length in enumerate(lengths.tolist()):
        k[row, length:], v[row, length:] = math.nan, math.inf
    return q, k, v, lengths


def check(got: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    plain = reference(q, k, v, lengths)
    check_close(got, plain, reference(q.double(), k.double(), v.double(), lengths), str(q.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("head", [1, 5, 32, 64, 72, 80, 128])
def test_float64_agrees(keys: int, head: int, dtype: torch.dtype) -> None:
    arguments = data(keys, head, dtype)
    out = cross_attention(*arguments)
    check(out, *arguments)
    assert (out[3] == 0).all() and torch.equal(out[2], arguments[2][2, :1].expand_as(out[2]))  # no key, one key
    assert torch.equal(out, cross_attention(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("queries, heads, head", [(1, 3, 40), (64, 2, 72), (65, 2, 16), (130, 1, 200), (3, 1, 300)])
def test_any_number_of_queries_heads_and_columns(queries: int, heads: int, head: int, dtype: torch.dtype) -> None:
    arguments = data(70, head, dtype, queries, heads)
    check(cross_attention(*arguments), *arguments)


@pytest.mark.parametrize("config", TABLE.candidates, ids=str)
def test_every_configuration_gives_the_same(config: _attention.Config) -> None:
    arguments = data(150, 72, queries=70)
    check(cross_attention(*arguments, config), *arguments)


def test_strides_do_not_matter() -> None:
    q, k, v, lengths = data(70, 24, heads=2)
    want = cross_attention(q, k, v, lengths)

    def inside_out(x: Tensor) -> Tensor:
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    kv = torch.stack([k, v], dim=2)
    every_other = torch.stack([lengths, lengths + 1], dim=1)[:, 0]
    assert torch.equal(want, cross_attention(q, kv[:, :, 0], kv[:, :, 1], every_other))
    assert torch.equal(want, cross_attention(inside_out(q), inside_out(k), inside_out(v), lengths))
    odd = torch.randn(4 * 70 * 2 * 25 + 1)[1:].view(4, 70, 2, 25)[..., :24]  # aligned to nothing
    odd.copy_(k)
    assert torch.equal(want, cross_attention(q, odd, v, lengths))
    sequence_first = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    assert torch.equal(want, cross_attention(*sequence_first, lengths))
    shared = cross_attention(q[:1].expand(4, -1, -1, -1), k, v, lengths)
    assert torch.equal(shared, cross_attention(q[:1].repeat(4, 1, 1, 1), k, v, lengths))


@pytest.mark.parametrize("batch, queries, keys, heads", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)])
def test_empty(batch: int, queries: int, keys: int, heads: int) -> None:
    q, k = torch.ones(batch, queries, heads, 8), torch.ones(batch, keys, heads, 8)
    out = cross_attention(q, k, k, torch.full((batch,), keys))
    assert out.shape == q.shape and (out == (0.0 if keys == 0 else 1.0)).all()


def test_lengths_beyond_the_keys_read_nothing() -> None:
    q, k, v, _ = data(3, 8)
    k, v = k.nan_to_num(), v.nan_to_num(posinf=0.0)
    out = cross_attention(q, k, v, torch.tensor([10**12, -1, 4, 3]))
    check(out, q, k, v, torch.tensor([3, 0, 3, 3]))


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # of NumPy, about the NaN asked for
def test_nan_and_infinity_that_are_not_ignored() -> None:
    q, k, v, lengths = data(70, 8)
    q[0, 2, 0, 3], v[1, 0, 0, 5], k[2, 0, 0, 7] = math.nan, math.inf, math.inf
    check(cross_attention(q, k, v, lengths), q, k, v, lengths)
    minus = torch.full_like(q, -math.inf)  # all scores are -inf: a softmax of nothing but zeros
    ones = torch.ones_like(k)
    check(cross_attention(minus, ones, ones, lengths), minus, ones, ones, lengths)
    k[0] = 1.0
    k[0, :64] = -1e38  # a first block of scores that are -inf, then others
    q[0] = 10.0
    check(cross_attention(q, k, v, lengths), q, k, v, lengths)


def test_float16_does_not_overflow() -> None:
    q, k, v, lengths = data(20, 72, torch.float16)
    q, k, v = q * 200, k * 200, v.sign() * 65504
    check(cross_attention(q, k, v, lengths), q, k, v, lengths)


def test_large_scores() -> None:
    """Weights that underflow, and differences of scores that are large beside their rounding."""
    q, k, v, lengths = data(130, 72)
    check(cross_attention(q * 30, k, v, lengths), q * 30, k, v, lengths)


def test_head_sizes_are_split_where_that_takes_fewer_columns() -> None:
    parts = {head: tuple(_attention.split(head)) for head in (1, 16, 17, 32, 33, 48, 64, 72, 80, 81, 96, 100, 128, 144)}
    assert parts == {
        1: (16, 0),
        16: (16, 0),
        17: (32, 0),
        32: (32, 0),
        33: (32, 16),
        48: (32, 16),
        64: (64, 0),
        72: (64, 16),
        80: (64, 16),
        81: (64, 32),
        96: (64, 32),
        100: (128, 0),
        128: (128, 0),
        144: (128, 16),
    }


def test_every_size_has_a_configuration() -> None:
    for capability in (80, 89, 90, 100, 103, 120):
        for head in (16, 48, 80, 128, 256, 1024):
            for itemsize in (2, 4):
                for rows in (1, 10**9):
                    sizes = {"head": head, "itemsize": itemsize, "rows": rows, "moments": 0}
                    assert TABLE.ship(capability, **sizes).blocks["BLOCK_KEYS"] >= 16
