"""kernels/fused_linear.py in Triton's interpreter, alone and as what a transformer block is made of. Float32 and
float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import fused_linear as kernels
from dcar_fast.kernels.configs import Config
from dcar_fast.kernels.cross_attention import cross_attention
from dcar_fast.kernels.self_attention import self_attention
from dcar_fast.models.transformer import Block
from dcar_fast.reference._moments import row_moments
from dcar_fast.reference.fused_linear import fused_linear as reference
from dcar_fast.reference.quantize_rows import quantize_rows
from tests.ops.moment_cases import check_moments
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

TYPES = [torch.float32, torch.float16]


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(outer: int, inner: int, dtype: torch.dtype = torch.float32, numbers: int | None = None):
    """Weight and bias, with results of the size of the inputs."""
    own = () if numbers is None else (numbers,)
    weight = (normals(*own, outer, inner, seed=1) * inner**-0.5).to(dtype)
    return weight, normals(*own, outer, seed=2, dtype=dtype)


def double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config | None = None, **how: object) -> Tensor:
    """The kernel's result against float64, and its moments against those of the result."""
    got = kernels.fused_linear(x, weight, bias, **how, config=config)
    how.pop("colsum", None)
    got, moments = got if how.pop("emit_moments", False) else (got, None)
    plain = reference(x, weight, bias, **how)
    exact = {name: double(value) for name, value in how.items() if name != "out_dtype"}
    if how.get("moments") is not None:
        exact["moments"] = row_moments(x.double())
    check_close(got, plain, reference(*map(double, (x, weight, bias)), **exact), str(got.dtype))
    if moments is not None:
        check_moments(moments, got)
    return got


# around tiles of 64 rows, of 64 columns, and of 32 or 64 deep
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("images", "rows", "outer", "inner"),
    [(9, 11, 3, 1), (7, 9, 5, 7), (1, 64, 64, 64), (3, 43, 65, 33), (1, 70, 130, 100), (2, 1, 128, 96)],
)
def test_float64_agrees(images: int, rows: int, outer: int, inner: int, dtype: torch.dtype) -> None:
    x, (weight, bias) = normals(images, rows, inner, dtype=dtype), layer(outer, inner, dtype)
    for activation in ("none", "gelu", "silu"):
        check(x, weight, bias, activation=activation, emit_moments=True)
    residual = normals(images, rows, outer, seed=3, dtype=dtype)
    check(x, weight, None, residual=residual, activation="gelu")
    check(x, weight, bias, moments=row_moments(x), residual=residual, emit_moments=True)
    check(x, weight, bias, moments=row_moments(x), eps=0.1, activation="gelu")
    check(x, weight, bias, activation="silu", out_dtype=torch.float32)


def test_a_single_number() -> None:
    one = torch.ones(1, 1, 1)
    y, moments = kernels.fused_linear(2 * one, 3 * one[0], one[0, 0], residual=5 * one, emit_moments=True)
    assert y.item() == 12 and moments.tolist() == [[[[12, 0]]]]
    assert kernels.fused_linear(one, one[0], one[0, 0], moments=row_moments(one)).item() == 1  # no variance


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mean", [-30.0, 30.0])
def test_means_that_are_large_beside_the_deviation(mean: float, dtype: torch.dtype) -> None:
    x, (weight, bias) = (normals(1, 40, 1152) + mean).to(dtype), layer(70, 1152, dtype)
    check(x, weight, bias, moments=row_moments(x), emit_moments=True)
    check(x, weight, bias, residual=torch.full((1, 40, 70), mean * 100, dtype=dtype), emit_moments=True)


def test_sums_of_the_weights_may_be_given() -> None:
    x, (weight, bias) = normals(2, 20, 96, dtype=torch.float16) + 3, layer(70, 96, torch.float16, numbers=2)
    colsum = weight.float().sum(dim=-1)
    moments = row_moments(x)
    got = check(x, weight, bias, moments=moments, colsum=colsum)
    assert torch.equal(got, kernels.fused_linear(x, weight, bias, moments=moments))
    assert not torch.equal(got, kernels.fused_linear(x, weight, bias, moments=moments, colsum=colsum + 1))
    wide = (x.float(), weight.float(), bias.float())
    want = kernels.fused_linear(*wide, moments=moments)
    assert torch.equal(want, kernels.fused_linear(*wide, moments=moments, colsum=colsum + 1))  # which has no use for it


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_without_variance(dtype: torch.dtype) -> None:
    x, (weight, bias) = normals(1, 9, 80, dtype=dtype), layer(66, 80, dtype)
    x[:, 2:5] = 3.0
    check(x, weight, bias, moments=row_moments(x))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("numbers", [1, 2, 4])
def test_weights_per_image(numbers: int, dtype: torch.dtype) -> None:
    x, (weight, bias) = normals(4, 65, 48, dtype=dtype), layer(70, 48, dtype, numbers)
    residual = normals(4, 65, 70, seed=3, dtype=dtype)
    got = check(x, weight, bias, residual=residual, emit_moments=True)
    check(x, weight, bias[0], moments=row_moments(x))
    for image in range(4):
        number = min(image, numbers - 1)
        alone = kernels.fused_linear(x[image, None], weight[number], bias[number], residual=residual[image, None])
        assert torch.equal(got[image], alone[0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("numbers", [None, 3])
def test_softmax(numbers: int | None, group: int, dtype: torch.dtype) -> None:
    """Lengths of nothing, one, some and all; foreign ones count as the nearest."""
    lengths = torch.tensor([0, 1, group - 3, group])
    x, (weight, bias) = normals(4, 17, 3 * group) * 3, layer(70, 3 * group, dtype, numbers)
    residual = normals(4, 17, 70, seed=3, dtype=dtype)
    how = {"group": group, "residual": residual}
    got = check(x, weight, bias, lengths=lengths, emit_moments=True, **how)
    check(x.to(dtype), weight, bias, lengths=lengths, **how)
    foreign = torch.tensor([-5, 1, group - 3, group + 2**40])
    assert torch.equal(got, kernels.fused_linear(x, weight, bias, lengths=foreign, **how))
    unseen = x.view(4, 17, 3, group).clone()
    for image, length in enumerate(lengths):
        unseen[image, ..., length:] = math.nan
    assert torch.equal(got, kernels.fused_linear(unseen.view(x.shape), weight, bias, lengths=lengths, **how))


def test_softmax_of_large_scores() -> None:
    x, (weight, bias) = normals(2, 9, 64) * 1000, layer(70, 64)
    x[0, 3] = -1e30
    check(x, weight, bias, lengths=torch.tensor([7, 16]), group=16)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # of NumPy, about the NaN asked for
def test_nan_and_infinity_go_where_the_formula_takes_them() -> None:
    x, (weight, bias) = normals(1, 5, 32), layer(70, 32)
    x[0, 1, 3], x[0, 2, 5], x[0, 3, 7] = math.nan, math.inf, -math.inf
    for activation in ("none", "gelu"):
        check(x, weight.abs(), bias, activation=activation)
    got = kernels.fused_linear(x, weight, bias, lengths=torch.tensor([16]), group=16)
    assert torch.equal(got.isnan().any(dim=2)[0], torch.tensor([False, True, True, False, False]))
    x[0, 3] = -math.inf
    scores = check(x, weight, bias, lengths=torch.tensor([16]), group=16)
    assert scores[0, 3].isnan().all()


def test_float16_overflows_to_infinity() -> None:
    x, weight = torch.full((1, 3, 64), 300.0, dtype=torch.float16), torch.full((5, 64), 4.0, dtype=torch.float16)
    got = check(x, weight, None)
    assert got.isposinf().all()
    assert check(x, weight, None, out_dtype=torch.float32).eq(300 * 4 * 64).all()


# the interpreter knows no stages: one of each tile is enough
@pytest.mark.parametrize("config", {str(c.blocks): c for c in kernels.TABLE.candidates}.values(), ids=str)
def test_every_configuration_gives_the_same(config: Config) -> None:
    x, (weight, bias) = normals(2, 70, 96), layer(200, 96)
    how = {"moments": row_moments(x), "activation": "gelu"}
    want = kernels.fused_linear(x, weight, bias, **how)
    got = check(x, weight, bias, config, emit_moments=True, **how)
    assert (got - want).abs().max() <= 2e-5  # sums in another order
    weight, bias = layer(70, 96, numbers=2)
    check(x[:, :20], weight, bias, config, lengths=torch.tensor([16, 3]), group=16, emit_moments=True)


def test_tiles_are_walked_over_in_groups() -> None:
    """More rows of tiles than are walked over together, and a remainder of them."""
    x, (weight, bias) = normals(1, 16 * 32 + 7, 16), layer(200, 16)
    check(x, weight, bias, kernels.tile(32, 64, 32, 4, 2))


def test_strides_and_empty() -> None:
    x, (weight, bias), residual = normals(2, 20, 40), layer(70, 40), normals(2, 20, 70, seed=3)
    how = {"moments": row_moments(x), "residual": residual}
    want = kernels.fused_linear(x, weight, bias, **how)
    room = torch.full((2, 20, 45), math.nan)
    room[..., :40] = x
    wide = {name: torch.stack([t, t], dim=-1)[..., 0] for name, t in how.items()}
    got = kernels.fused_linear(room[..., :40], weight.T.contiguous().T, torch.stack([bias, bias], -1)[:, 0], **wide)
    assert torch.equal(got, want)
    for images, rows in ((0, 3), (2, 0)):
        y, moments = kernels.fused_linear(torch.ones(images, rows, 40), weight, bias, emit_moments=True)
        assert y.shape == (images, rows, 70) and moments.shape == (images, rows, 2, 2)


# ---- one block of the transformer out of these launches


WIDTH, HEADS, TEXT = 128, 4, 16


def block_and_inputs() -> tuple[Block, Tensor, Tensor, Tensor]:
    """A block, x (2, N, D), text (2, T, D), and how many of its states each image looks at."""
    block = Block(WIDTH, HEADS, 2 * WIDTH, qk_norm=True)
    for seed, parameter in enumerate(block.parameters()):
        values = normals(*parameter.shape, seed=seed)
        parameter.data = values * WIDTH**-0.5 if parameter.dim() == 2 else values * 0.3 + 0.5
    return block, normals(2, 21, WIDTH, seed=50) + 2, normals(2, TEXT, WIDTH, seed=51), torch.tensor([5, TEXT])


def seen_by_keys(block: Block, x: Tensor, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """x + cross-attention, and its moments, in three launches."""
    cross = block.cross_attn
    k, v = kernels.fused_linear(text, cross.kv.weight, cross.kv.bias).unflatten(2, (2, HEADS, -1)).unbind(2)
    q = kernels.fused_linear(x, cross.q.weight, cross.q.bias).unflatten(2, (HEADS, -1))
    looked = cross_attention(q, k, v, lengths).flatten(2)
    return kernels.fused_linear(looked, cross.proj.weight, cross.proj.bias, residual=x, emit_moments=True)


def seen_absorbed(block: Block, x: Tensor, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The same in two, with the projections multiplied into keys and values."""
    cross = block.cross_attn
    k, v = kernels.fused_linear(text, cross.kv.weight, cross.kv.bias).unflatten(2, (2, HEADS, -1)).unbind(2)
    scale = (WIDTH // HEADS) ** -0.5
    q, q_bias = ((t * scale).unflatten(0, (HEADS, -1)) for t in (cross.q.weight, cross.q.bias))
    keys = torch.einsum("bthd,hdi->bhti", k, q).flatten(1, 2)  # (B, H T, D)
    key_bias = torch.einsum("bthd,hd->bht", k, q_bias).flatten(1)
    values = torch.einsum("bthd,ohd->boht", v, cross.proj.weight.unflatten(1, (HEADS, -1))).flatten(2)  # (B, D, H T)
    scores = kernels.fused_linear(x, keys, key_bias)
    how = {"lengths": lengths, "group": TEXT, "residual": x, "emit_moments": True}
    return kernels.fused_linear(scores, values, cross.proj.bias, **how)


@pytest.mark.parametrize("seen", [seen_by_keys, seen_absorbed])
@torch.no_grad()
def test_a_block_of_the_transformer(seen) -> None:
    """Eight launches, seven with absorbed projections, against the model's own module."""
    block, x, text, lengths = block_and_inputs()
    mask = torch.arange(TEXT) < lengths[:, None]
    plain = block(x, text, mask)
    truth = block.double()(x.double(), text.double(), mask)
    attention, mlp = block.float().self_attn, block.mlp

    norms = (attention.q_norm.weight, attention.q_norm.bias, attention.k_norm.weight)
    qkv, moments = kernels.fused_linear(
        x, attention.qkv.weight, attention.qkv.bias, moments=row_moments(x), emit_moments=True
    )
    looked = self_attention(qkv, *norms, HEADS, attention.q_norm.eps, moments)
    y = kernels.fused_linear(looked, attention.proj.weight, attention.proj.bias, residual=x)
    y, moments = seen(block, y, text, lengths)
    hidden = kernels.fused_linear(y, mlp.fc1.weight, mlp.fc1.bias, moments=moments, activation="gelu")
    y, moments = kernels.fused_linear(hidden, mlp.fc2.weight, mlp.fc2.bias, residual=y, emit_moments=True)
    check_close(y, plain, truth)
    check_moments(moments, y)


# ---- float8, whose products the interpreter makes in float16: of 11 bits, exact


def float8(images: int, rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Values and scales; rows are of different sizes."""
    x = normals(images, rows, width, seed=seed) * torch.logspace(-2, 2, rows)[:, None]
    return quantize_rows(x)


@pytest.mark.parametrize(
    ("images", "rows", "outer", "inner"),
    [(9, 11, 3, 1), (3, 43, 65, 33), (1, 64, 64, 128), (1, 70, 130, 300), (2, 1, 128, 256)],
)
@pytest.mark.parametrize("dtype", TYPES)
def test_float8(images: int, rows: int, outer: int, inner: int, dtype: torch.dtype) -> None:
    (x, x_scale), (weight, weight_scale) = float8(images, rows, inner, 0), float8(1, outer, inner, 1)
    weight, bias = weight[0], normals(outer, seed=2, dtype=dtype)
    residual = normals(images, rows, outer, seed=3, dtype=dtype)
    how = {"x_scale": x_scale, "weight_scale": weight_scale[0] * inner**-0.5, "out_dtype": dtype}
    for activation in ("none", "gelu"):
        check_float8(x, weight, bias, **how, residual=residual, activation=activation, emit_moments=True)
    check_float8(x, weight, None, **how)


def check_float8(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config | None = None, **how: object) -> Tensor:
    """Against float64. Scales come after the sums here and before them in the formula: float32 may differ by that."""
    got = kernels.fused_linear(x, weight, bias, **how, config=config)
    got, moments = got if how.pop("emit_moments", False) else (got, None)
    dtype = how.pop("out_dtype")
    exact = {name: double(value) for name, value in how.items()}
    truth = reference(x.double(), weight.double(), double(bias), **exact)
    check_close(got, reference(x, weight, bias, **how, out_dtype=dtype), truth, str(dtype))
    if moments is not None:
        check_moments(moments, got)
    return got


@pytest.mark.parametrize("config", {str(c.blocks): c for c in kernels.TABLE.candidates}.values(), ids=str)
def test_every_configuration_gives_the_same_in_float8(config: Config) -> None:
    (x, x_scale), (weight, weight_scale) = float8(2, 70, 160, 0), float8(1, 130, 160, 1)
    how = {"x_scale": x_scale, "weight_scale": weight_scale[0] / 16, "out_dtype": torch.float16}
    check_float8(x, weight[0], normals(130, dtype=torch.float16), config, emit_moments=True, **how)


def test_float8_rows_that_are_not_finite_stay_alone() -> None:
    x = normals(1, 4, 40)
    x[0, 1, 3], x[0, 2, 5] = math.nan, math.inf
    (x, x_scale), (weight, weight_scale) = quantize_rows(x), float8(1, 9, 40, 1)
    how = {"x_scale": x_scale, "weight_scale": weight_scale[0], "out_dtype": torch.float32}
    got = kernels.fused_linear(x, weight[0], None, **how)
    bad = torch.tensor([False, True, True, False])
    assert torch.equal(got.isnan().all(dim=2)[0], bad) and torch.equal(got.isnan().any(dim=2)[0], bad)
