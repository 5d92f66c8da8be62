"""Every implementation of fused_linear against float64, and against PyTorch's own layers; bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.ops import embed_tokens, fused_linear
from dcar_fast.ops._dispatch import launches
from dcar_fast.reference._moments import combined, row_moments
from tests.ops.moment_cases import check_moments
from tests.ops.sampling_cases import normals
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

LOW = [torch.float32, torch.float16, torch.bfloat16]
HERE = ["reference", None]
GPU = ["reference", "triton", None]
ACTIVATIONS = {"none": lambda y: y, "gelu": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}
# images, rows, V, K
SHAPES = [(3, 7, 5, 1), (2, 3, 70, 33), (1, 65, 64, 64), (3, 43, 65, 130)]
LARGE = [(2, 256, 3456, 1152), (8, 256, 1152, 1152), (2, 1000, 1152, 4608)]


def layer(outer: int, inner: int, dtype: torch.dtype, *own: int) -> tuple[Tensor, Tensor]:
    """Weight and bias, (G, ...) each with ``own`` G; results are of the size of the inputs."""
    return (normals(*own, outer, inner, seed=1) * inner**-0.5).to(dtype), normals(*own, outer, seed=2, dtype=dtype)


def spelled_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    normed: float | None = None,
    lengths: Tensor | None = None,
    group: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """One image at a time, computed in ``dtype``. ``normed``: the eps of a LayerNorm."""
    images = []
    for b, rows in enumerate(x.to(dtype)):
        own = min(b, len(weight) - 1) if weight.dim() == 3 else ...
        if normed is not None:
            rows = F.layer_norm(rows, rows.shape[-1:], eps=normed)
        if lengths is not None:
            weights = torch.zeros_like(rows).view(len(rows), -1, group)
            weights[..., : lengths[b]] = rows.view(weights.shape)[..., : lengths[b]].softmax(dim=-1)
            rows = weights.flatten(1)
        y = rows @ weight[own].to(dtype).T
        if bias is not None:
            y = y + (bias[own] if bias.dim() == 2 else bias).to(dtype)
        y = ACTIVATIONS[activation](y)
        images.append(y if residual is None else y + residual[b].to(dtype))
    return torch.stack(images)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    backend: str | None,
    device: str = "cpu",
    normed: float | None = None,
    emit_moments: bool = False,
    out_dtype: torch.dtype | None = None,
    **how: object,
) -> Tensor:
    """Against float64, no worse than twice PyTorch in float32 rounded once; the moments against those of the result."""

    def there(value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    formula = {name: there(value) for name, value in how.items()}
    given = formula
    if normed is not None:
        given = {**formula, "moments": there(row_moments(x)), "eps": normed}
    inputs = [there(value) for value in (x, weight, bias)]
    options = {"emit_moments": emit_moments, "out_dtype": out_dtype, "backend": backend}
    got = fused_linear(*inputs, **given, **options)
    assert all(map(torch.equal, got, fused_linear(*inputs, **given, **options)))
    got, moments = got if emit_moments else (got, None)
    assert got.is_contiguous() and got.dtype == (out_dtype or weight.dtype)
    narrow = got.dtype != weight.dtype  # a float32 result of 16-bit products, which tensor cores add up as for 16 bits
    assert not narrow or (got != got.to(weight.dtype)).any()
    # in PyTorch on the same device: in which order it adds up differs
    plain = spelled_out(*inputs, weight.dtype if narrow else torch.float32, normed=normed, **formula)
    truth = spelled_out(x, weight, bias, torch.float64, normed=normed, **how)
    check_close(got.cpu(), plain.to(got.dtype).cpu(), truth, str(got.dtype))
    if moments is not None:
        check_moments(moments.cpu(), got.cpu())
    return got


def check_all(images: int, rows: int, outer: int, inner: int, dtype: torch.dtype, backend: str | None, device: str):
    where = {"backend": backend, "device": device}
    x, (weight, bias) = (normals(images, rows, inner) + 0.5).to(dtype), layer(outer, inner, dtype)
    residual = normals(images, rows, outer, seed=3, dtype=dtype)
    check(x, weight, bias, **where)
    check(x, weight, None, activation="silu", out_dtype=torch.float32, **where)
    check(x, weight, bias, activation="gelu", residual=residual, emit_moments=True, **where)
    check(x, weight, bias, normed=1e-6, activation="gelu", **where)
    check(x, weight, bias, normed=1e-2, residual=residual, emit_moments=True, **where)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("images", "rows", "outer", "inner"), SHAPES)
def test_float64_agrees(
    images: int, rows: int, outer: int, inner: int, dtype: torch.dtype, backend: str | None
) -> None:
    check_all(images, rows, outer, inner, dtype, backend, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("images", "rows", "outer", "inner"), [*SHAPES[1:], *LARGE])
def test_float64_agrees_on_a_gpu(
    images: int, rows: int, outer: int, inner: int, dtype: torch.dtype, backend: str | None
) -> None:
    check_all(images, rows, outer, inner, dtype, backend, "cuda")


def check_weights_per_image(dtype: torch.dtype, backend: str | None, device: str) -> None:
    for numbers in (1, 2, 4):
        x, (weight, bias) = normals(4, 21, 33, dtype=dtype), layer(70, 33, dtype, numbers)
        check(x, weight, bias, backend=backend, device=device)
        check(x, weight, bias[0], normed=1e-6, backend=backend, device=device, emit_moments=True)


def check_softmax(dtype: torch.dtype, group: int, backend: str | None, device: str) -> None:
    lengths = torch.tensor([0, 1, group - 3, group])
    for own in ((), (3,)):
        x, (weight, bias) = normals(4, 21, 3 * group) * 3, layer(70, 3 * group, dtype, *own)
        how = {"lengths": lengths, "group": group, "residual": normals(4, 21, 70, seed=3, dtype=dtype)}
        check(x, weight, bias, emit_moments=True, **how, backend=backend, device=device)
        check(x.to(dtype), weight, None, **how, backend=backend, device=device)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LOW)
def test_weights_per_image(dtype: torch.dtype, backend: str | None) -> None:
    check_weights_per_image(dtype, backend, "cpu")


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("group", [16, 32, 64])
def test_softmax(dtype: torch.dtype, group: int, backend: str | None) -> None:
    check_softmax(dtype, group, backend, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("group", [16, 32, 64])
def test_images_of_their_own_on_a_gpu(dtype: torch.dtype, group: int, backend: str | None) -> None:
    check_weights_per_image(dtype, backend, "cuda")
    check_softmax(dtype, group, backend, "cuda")


def check_large_means(dtype: torch.dtype, backend: str | None, device: str) -> None:
    x, (weight, bias) = (normals(1, 40, 1152) + 30).to(dtype), layer(70, 1152, dtype)
    check(x, weight, bias, normed=1e-6, emit_moments=True, backend=backend, device=device)


@pytest.mark.parametrize("dtype", LOW)
def test_means_that_are_large_beside_the_deviation(dtype: torch.dtype) -> None:
    check_large_means(dtype, "reference", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW)
def test_means_that_are_large_beside_the_deviation_on_a_gpu(dtype: torch.dtype) -> None:
    check_large_means(dtype, "triton", "cuda")


@pytest.mark.gpu
def test_kernels_take_the_nearest_length() -> None:
    x, (weight, bias) = normals(2, 5, 32).cuda(), (t.cuda() for t in layer(70, 32, torch.float32))
    got, want = (
        fused_linear(x, weight, bias, lengths=torch.tensor(lengths).cuda(), group=16, backend="triton")
        for lengths in ([-7, 2**40], [0, 16])
    )
    assert torch.equal(got, want)


def test_float64_stays_float64() -> None:
    x, (weight, bias) = normals(2, 5, 70, dtype=torch.float64), layer(9, 70, torch.float64)
    y, moments = fused_linear(x, weight, bias, moments=row_moments(x), emit_moments=True)
    assert (y.dtype, moments.dtype) == (torch.float64, torch.float64)
    assert (y - spelled_out(x, weight, bias, torch.float64, normed=1e-6)).abs().max() < 1e-14


@pytest.mark.parametrize("width", [1, 63, 64, 65, 1152])
def test_moments_are_those_of_layer_norm(width: int) -> None:
    """By pieces of 64 columns, and put together again."""
    x = normals(3, 5, width, dtype=torch.float64) * 2 + 30
    moments = row_moments(x)
    for number, piece in enumerate(x.split(64, dim=2)):
        assert (moments[:, :, number, 0] - piece.mean(dim=2)).abs().max() < 1e-13
        squares = piece.var(dim=2, correction=0) * piece.shape[2]
        assert (moments[:, :, number, 1] - squares).abs().max() < 1e-10
    mean, rstd = combined(moments, width, 1e-3)
    assert ((x - mean) * rstd - F.layer_norm(x, (width,), eps=1e-3)).abs().max() < 1e-10


def test_the_given_moments_are_what_is_used() -> None:
    x, (weight, bias) = normals(2, 5, 70), layer(9, 70, torch.float32)
    want = fused_linear(x, weight, bias, moments=row_moments(x))
    assert (fused_linear(x, weight, bias, moments=row_moments(2 * x)) - want).abs().max() > 0.1


def test_chains_with_embed_tokens() -> None:
    """Two layers of a transformer's kind, each reading the moments that the one before it left."""
    table, positions = normals(9, 96), normals(5, 96, seed=1)
    ids = torch.arange(10).view(2, 5) % 9
    (up, up_bias), (down, down_bias) = layer(200, 96, torch.float32), layer(96, 200, torch.float32)
    x, moments = embed_tokens(ids, table, positions)
    hidden = fused_linear(x, up, up_bias, moments=moments, activation="gelu")
    y, moments = fused_linear(hidden, down, down_bias, residual=x, emit_moments=True)
    got = fused_linear(y, up, up_bias, moments=moments)
    e = (table[ids] + positions).double()
    up, up_bias, down, down_bias = (t.double() for t in (up, up_bias, down, down_bias))

    def normed(x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, (96,), eps=1e-6), up, up_bias)

    e = e + F.linear(F.gelu(normed(e), approximate="tanh"), down, down_bias)
    assert (got - normed(e)).abs().max() < 1e-5


def test_strides_and_empty() -> None:
    x, (weight, bias) = normals(2, 20, 40), layer(70, 40, torch.float32)
    want = fused_linear(x, weight, bias)
    got = fused_linear(x.permute(2, 1, 0).contiguous().permute(2, 1, 0), weight.T.contiguous().T, bias)
    assert (got - want).abs().max() < 1e-6
    for images, rows in ((0, 3), (2, 0)):
        y, moments = fused_linear(torch.ones(images, rows, 40), weight, bias, emit_moments=True)
        assert y.shape == (images, rows, 70) and moments.shape == (images, rows, 2, 2)


def test_many_rows() -> None:
    x = normals(65_537, 1, 2)
    assert torch.equal(fused_linear(x, torch.eye(2), None), x)


def test_opcheck() -> None:
    x, (weight, bias) = normals(2, 5, 32), layer(70, 32, torch.float32, 2)
    operator, lengths = torch.ops.dcar_fast.fused_linear.default, torch.tensor([3, 16])
    residual = normals(2, 5, 70)
    rest = ("gelu", residual, True, torch.float32, None, None, None)
    torch.library.opcheck(operator, (x, weight, bias, None, None, 1e-6, lengths, 16, *rest))
    rest = ("none", None, False, torch.float32, None, None, None)
    torch.library.opcheck(operator, (x, weight, None, row_moments(x), weight.sum(-1), 1e-6, None, None, *rest))


def test_compiles_as_one_graph_and_exports() -> None:
    class Layers(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y, moments = fused_linear(x, weight, bias, activation="silu", emit_moments=True)
            return fused_linear(y, weight, bias, moments=moments) + 1

    inputs = normals(2, 5, 40), *layer(40, 40, torch.float32)
    want = Layers()(*inputs)
    compiled = torch.compile(Layers(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Layers(), inputs)
    for call in (compiled, exported.module()):
        assert torch.equal(call(*inputs), want)
    assert torch.ops.dcar_fast.fused_linear.default in [node.target for node in exported.graph.nodes]


def test_launches_are_declared() -> None:
    assert launches("fused_linear") == 1


X, WEIGHT, BIAS, MOMENTS = torch.zeros(2, 3, 96), torch.zeros(5, 96), torch.zeros(5), torch.zeros(2, 3, 2, 2)
SEVERAL, LENGTHS = torch.zeros(2, 5, 96), torch.tensor([0, 16])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x has shape \(3, 96\), allowed is \(B, N, K\)"),
        ({"x": X.half()}, "x is torch.float16, allowed is the type of weight, torch.float32$"),
        ({"x": X.half(), "lengths": LENGTHS, "group": 16}, "x is torch.float16, allowed is .*, or torch.float32"),
        ({"weight": WEIGHT[:, :95]}, r"weight has shape \(5, 95\), allowed is \(V, 96\)"),
        ({"weight": SEVERAL[..., :95]}, r"weight has shape \(2, 5, 95\), allowed is \(G, V, 96\)"),
        ({"weight": SEVERAL[:0]}, r"weight has shape \(0, 5, 96\), allowed are sizes of at least 1"),
        ({"weight": WEIGHT.long()}, "weight is torch.int64, allowed are torch.float32"),
        ({"weight": WEIGHT.to("meta")}, "weight is on meta, allowed is the device of x, cpu"),
        ({"bias": BIAS[:4]}, r"bias has shape \(4,\), allowed is \(5\)"),
        ({"bias": torch.zeros(2, 5)}, r"bias has shape \(2, 5\), allowed is \(5\)"),
        ({"weight": SEVERAL, "bias": torch.zeros(3, 5)}, r"bias has shape \(3, 5\), allowed is \(2, 5\)"),
        ({"bias": BIAS.half()}, "bias is torch.float16, allowed is the type of weight, torch.float32"),
        ({"residual": X}, r"residual has shape \(2, 3, 96\), allowed is \(2, 3, 5\)"),
        ({"residual": torch.zeros(2, 3, 5).half()}, "residual is torch.float16, allowed is the type of weight"),
        ({"moments": MOMENTS[:, :, :1]}, r"moments has shape \(2, 3, 1, 2\), allowed is \(2, 3, 2, 2\)"),
        ({"moments": MOMENTS.half()}, "moments is torch.float16, allowed is torch.float32"),
        ({"colsum": BIAS}, "colsum is a tensor, allowed is None without moments"),
        ({"moments": MOMENTS, "colsum": BIAS[:4]}, r"colsum has shape \(4,\), allowed is \(5\)"),
        ({"moments": MOMENTS, "colsum": BIAS.double()}, "colsum is torch.float64, allowed is torch.float32"),
        ({"eps": -1.0}, "eps is -1.0, allowed is a finite number >= 0"),
        ({"lengths": LENGTHS, "group": 16, "moments": MOMENTS}, "lengths is a tensor, allowed is None with moments"),
        ({"lengths": LENGTHS}, "group is None, allowed are 16, 32, 64"),
        ({"lengths": LENGTHS, "group": 48}, "group is 48, allowed are 16, 32, 64"),
        ({"lengths": LENGTHS, "group": 64}, r"x has shape \(2, 3, 96\), allowed is .* K a multiple of group, 64"),
        ({"group": 16}, "group is 16, allowed is None without lengths"),
        ({"lengths": LENGTHS[:1], "group": 16}, r"lengths has shape \(1,\), allowed is \(2\)"),
        ({"lengths": LENGTHS.int(), "group": 16}, "lengths is torch.int32, allowed is torch.int64"),
        ({"lengths": LENGTHS + 1, "group": 16}, r"lengths has values in 1\.\.17, allowed are 0\.\.16"),
        ({"lengths": LENGTHS - 1, "group": 16}, r"lengths has values in -1\.\.15, allowed are 0\.\.16"),
        ({"activation": "relu"}, "activation is 'relu', allowed are 'none', 'gelu', 'silu'"),
        ({"out_dtype": torch.float16}, "out_dtype is torch.float16, allowed are the type of weight, torch.float32"),
        ({"weight": WEIGHT.clone().requires_grad_()}, "weight requires a gradient, which fused_linear does not have"),
        ({"backend": "native"}, "backend is 'native', which cannot run fused_linear"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, **change}
    with pytest.raises(ValueError, match=message):
        fused_linear(**arguments)
