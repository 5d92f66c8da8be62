"""kernels/self_attention.py in Triton's interpreter. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import self_attention as kernels
from dcar_fast.kernels.configs import Config
from dcar_fast.reference._moments import row_moments
from dcar_fast.reference.self_attention import self_attention as reference
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

EPS = 1e-5


def data(tokens: int, heads: int, head: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """qkv of two images, with a mean that is not zero, then weight and bias of q and of k."""
    generator = torch.Generator().manual_seed(tokens * 1000 + head)
    width = heads * head
    qkv = torch.randn(2, tokens, 3 * width, generator=generator) * 1.5 + 0.7
    return qkv.to(dtype), *(torch.randn(width, generator=generator).to(dtype) for _ in range(4))


def run(inputs: tuple[Tensor, ...], heads: int, eps: float = EPS, config: Config | None = None) -> Tensor:
    return kernels.self_attention(*inputs[:4], heads, eps, config=config)


def check(got: Tensor, inputs: tuple[Tensor, ...], heads: int, eps: float = EPS) -> None:
    truth = reference(*(x.double() for x in inputs), heads=heads, eps=eps)
    check_close(got, reference(*inputs, heads=heads, eps=eps), truth, str(got.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "tokens, head",
    [*((tokens, head) for tokens in (1, 65) for head in (1, 5, 32, 64, 72, 80, 128)), (63, 72), (64, 72)],
)
def test_float64_agrees(tokens: int, head: int, dtype: torch.dtype) -> None:
    inputs = data(tokens, 2, head, dtype)
    out = run(inputs, 2)
    check(out, inputs, 2)
    assert torch.equal(out, run(inputs, 2))


def test_many_tokens() -> None:
    inputs = data(300, 1, 72, torch.float16)
    check(run(inputs, 1), inputs, 1)


def test_full_width() -> None:
    inputs = data(17, 16, 72, torch.float16)
    check(run(inputs, 16), inputs, 16)


# the interpreter knows no stages: one of each tile is enough
@pytest.mark.parametrize("config", [c for c in kernels.TABLE.candidates if c.num_stages == 2], ids=str)
def test_every_attention_configuration_gives_the_same(config: Config) -> None:
    inputs = data(130, 2, 40)
    check(run(inputs, 2, config=config), inputs, 2)


def check_statistics(qkv: Tensor, config: Config | None = None) -> None:
    """Against float64, no worse than twice PyTorch in float32."""

    def plain(x: Tensor) -> Tensor:
        parts = [part for part in x.chunk(3, dim=2)[:2]]
        return torch.stack(
            [value for part in parts for value in (part.mean(dim=2), (part.var(dim=2, correction=0) + EPS).rsqrt())]
        )

    check_close(kernels.row_statistics(qkv, EPS, config), plain(qkv.float()), plain(qkv.double()))


@pytest.mark.parametrize("config", [None, *kernels.STATISTICS.candidates], ids=str)
@pytest.mark.parametrize("width", [1, 1152, 2500])
def test_statistics(width: int, config: Config | None) -> None:
    qkv = torch.randn(2, 3, 3 * width, generator=torch.Generator().manual_seed(width)) + 20
    check_statistics(qkv, config)
    check_statistics(qkv.transpose(0, 1), config)
    check_statistics(qkv.half(), config)


# ---- statistics from row moments


def check_with_moments(
    inputs: tuple[Tensor, ...], heads: int, eps: float = EPS, config: Config | None = None
) -> Tensor:
    got = kernels.self_attention(*inputs[:4], heads, eps, row_moments(inputs[0]), config)
    check(got, inputs, heads, eps)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens, heads, head", [(1, 1, 64), (63, 2, 32), (64, 4, 16), (65, 2, 96), (70, 8, 24)])
def test_moments(tokens: int, heads: int, head: int, dtype: torch.dtype) -> None:
    inputs = data(tokens, heads, head, dtype)
    out = check_with_moments(inputs, heads)
    assert torch.equal(out, check_with_moments(inputs, heads))


def test_moments_at_full_width() -> None:
    check_with_moments(data(17, 16, 72, torch.float16), 16)


@pytest.mark.parametrize("config", [c for c in kernels.TABLE.candidates if c.num_stages == 2], ids=str)
def test_every_attention_configuration_gives_the_same_from_moments(config: Config) -> None:
    check_with_moments(data(130, 2, 32), 2, config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_moments_of_large_means_and_of_rows_without_variance(dtype: torch.dtype) -> None:
    qkv, *weights = data(65, 2, 32)
    inputs = tuple(x.to(dtype) for x in (qkv + 100, *weights))
    check_with_moments(inputs, 2)
    inputs[0][:, 3:7] = 3.0
    check_with_moments(inputs, 2, eps=1e-2)


def test_moments_are_what_is_used() -> None:
    """Those of q and of k, not those of v; no statistics are taken besides."""
    inputs = data(33, 2, 32)
    moments = row_moments(inputs[0])
    want = check_with_moments(inputs, 2)
    for part, matters in enumerate((True, True, False)):
        others = moments.clone()
        others[:, ::2, part, 1] *= 4
        got = kernels.self_attention(*inputs[:4], 2, EPS, others)
        assert torch.equal(got, want) != matters
    room = torch.stack((moments, moments), dim=-1)[..., 0]
    assert torch.equal(want, kernels.self_attention(*inputs[:4], 2, EPS, room))


def test_strides_and_empty() -> None:
    qkv, *weights = data(33, 2, 24)
    want = run((qkv, *weights), 2)
    wide = [torch.stack([x, x], dim=-1)[..., 0] for x in weights]
    inside_out = qkv.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    sequence_first = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    room = torch.full((2, 33, 145), math.nan)  # rows aligned to nothing
    room[..., :144] = qkv
    for other in (inside_out, sequence_first, room[..., :144]):
        assert torch.equal(want, run((other, *wide), 2))
    for shape in ((0, 3, 144), (2, 0, 144)):
        assert run((torch.ones(shape), *weights), 2).shape == (*shape[:2], 48)


def test_weights_of_another_type() -> None:
    inputs = data(10, 2, 8, torch.float16)
    inputs = (inputs[0], inputs[1].float(), inputs[2].double(), *inputs[3:])
    check(run(inputs, 2), inputs, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mean", [10.0, 100.0])
def test_means_that_are_large_beside_the_deviation(mean: float, dtype: torch.dtype) -> None:
    qkv, *weights = data(65, 2, 72)
    inputs = tuple(x.to(dtype) for x in (qkv + mean, *weights))
    check(run(inputs, 2), inputs, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_without_variance(dtype: torch.dtype) -> None:
    qkv, *weights = data(20, 2, 8, dtype)
    qkv[:, 3:7] = 3.0
    for eps in (1e-5, 1e-2):
        check(run((qkv, *weights), 2, eps), (qkv, *weights), 2, eps)


def test_bias_of_k_changes_nothing() -> None:
    *inputs, k_bias = data(30, 2, 8)
    out = run((*inputs, k_bias), 2)
    check(out, (*inputs, k_bias * 3), 2)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # of NumPy, about the NaN asked for
def test_nan_and_infinity_go_where_the_formula_takes_them() -> None:
    qkv, *weights = data(6, 2, 4)
    qkv = torch.cat([qkv, qkv])
    qkv[0, 2, 3], qkv[1, 1, 8 + 1], qkv[2, 4, 16 + 5] = math.nan, math.inf, -math.inf  # in a query, a key, a value
    check(run((qkv, *weights), 2), (qkv, *weights), 2)


def test_float16_near_overflow() -> None:
    qkv, *weights = data(20, 2, 72, torch.float16)
    inputs = ((qkv.clamp(-4, 4) * 16000).clamp(-65504, 65504), *weights)
    check(run(inputs, 2), inputs, 2)
