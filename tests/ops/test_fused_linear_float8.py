"""fused_linear on float8, every implementation: against float64 on what the values stand for; bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.ops import _dispatch, fused_linear, quantize_rows
from tests.ops.moment_cases import check_moments
from tests.ops.sampling_cases import normals
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HERE = ["reference", None]
TYPES = [torch.bfloat16, torch.float16, torch.float32]
ACTIVATIONS = {"none": lambda y: y, "gelu": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}
# images, rows, V, K
SHAPES = [(3, 7, 5, 1), (2, 3, 70, 33), (1, 65, 64, 128), (3, 43, 65, 130)]
LARGE = [(2, 256, 3456, 1152), (8, 256, 4608, 1152), (2, 1000, 1152, 4608)]


def float8(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """(1, rows, width) values and (1, rows) scales of normals of different sizes from row to row."""
    return quantize_rows(normals(1, rows, width, seed=seed) * torch.logspace(-2, 2, rows)[:, None])


def data(images: int, rows: int, outer: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    x, x_scale = float8(images * rows, inner, 0)
    weight, weight_scale = float8(outer, inner, 1)
    return {
        "x": x.view(images, rows, inner),
        "weight": weight[0],
        "bias": normals(outer, seed=2, dtype=dtype),
        "x_scale": x_scale.view(images, rows),
        "weight_scale": weight_scale[0] * inner**-0.5,
        "residual": normals(images, rows, outer, seed=3, dtype=dtype),
    }


def spelled_out(given: dict[str, Tensor], dtype: torch.dtype, activation: str) -> Tensor:
    x, weight, bias, residual = (given[name] for name in ("x", "weight", "bias", "residual"))
    x, weight = x.to(dtype) * given["x_scale"].to(dtype)[..., None], weight.to(dtype) * given["weight_scale"][:, None]
    y = x @ weight.to(dtype).T
    y = ACTIVATIONS[activation](y if bias is None else y + bias.to(dtype))
    return y if residual is None else y + residual.to(dtype)


def check(given: dict[str, Tensor], backend: str | None, out_dtype: torch.dtype, device: str = "cpu", **how) -> Tensor:
    """Against float64, no worse than twice PyTorch in float32 rounded once. A GPU's instructions keep about 14 bits
    while they add up 128 products: its float32 results are judged by the sum of the products' absolute values."""
    activation, emit = how.get("activation", "none"), how.get("emit_moments", False)
    there = {name: t if t is None else t.to(device) for name, t in given.items()}
    got = fused_linear(**there, out_dtype=out_dtype, backend=backend, **how)
    got, moments = got if emit else (got, None)
    assert got.is_contiguous() and got.dtype == out_dtype
    truth = spelled_out(given, torch.float64, activation)
    if device == "cuda" and out_dtype == torch.float32:
        sizes = {"x": given["x"].double().abs(), "weight": given["weight"].double().abs(), "bias": None}
        bound = 2.0**-12 * spelled_out({**given, **sizes, "residual": None}, torch.float64, "none")
        assert ((got.cpu().double() - truth).abs() <= bound + 1e-6 * (1 + truth.abs())).all()
    else:
        check_close(got.cpu(), spelled_out(there, torch.float32, activation).to(out_dtype).cpu(), truth, str(out_dtype))
    if moments is not None:
        check_moments(moments.cpu(), got.cpu())
    return got


def check_all(shape: tuple[int, ...], dtype: torch.dtype, backend: str | None, device: str) -> None:
    given = data(*shape, dtype)
    check(given, backend, dtype, device)
    check(given, backend, dtype, device, emit_moments=True)
    check(given, backend, dtype, device, activation="gelu", emit_moments=True)
    check({**given, "bias": None, "residual": None}, backend, dtype, device, activation="silu")


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees(shape: tuple[int, ...], dtype: torch.dtype, backend: str | None) -> None:
    check_all(shape, dtype, backend, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", None])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [*SHAPES[1:], *LARGE])
def test_float64_agrees_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, backend: str | None) -> None:
    usable = _dispatch.float8_usable(torch.device("cuda", 0))
    if backend == "triton" and not usable.ok:
        pytest.skip(usable.reason)
    check_all(shape, dtype, backend, "cuda")


def test_a_layer_in_float8_is_near_the_layer() -> None:
    """Quantised on both sides: each product is off by about 2^-5 of itself, in no direction."""
    x, weight, bias = normals(1, 50, 256), normals(90, 256, seed=1) / 16, normals(90, seed=2)
    values, scales = quantize_rows(x)
    weights, weight_scales = (t[0] for t in quantize_rows(weight[None]))
    how = {"x_scale": scales, "weight_scale": weight_scales, "out_dtype": torch.float32}
    error = fused_linear(values, weights, bias, **how) - F.linear(x, weight, bias)
    assert 0.02 < error.std() < 0.05 and error.mean().abs() < 0.005


def test_every_scale_counts() -> None:
    given = data(2, 5, 9, 40) | {"bias": None, "residual": None}
    want = fused_linear(**given, out_dtype=torch.float32)
    for name, factor in (("x_scale", (2, 5, 1)), ("weight_scale", (9,))):
        powers = 2.0 ** torch.arange(given[name].numel())
        changed = {**given, name: given[name] * powers.view(given[name].shape)}
        assert torch.equal(fused_linear(**changed, out_dtype=torch.float32), want * powers.view(factor))


def test_rows_that_are_not_finite_stay_alone() -> None:
    x = normals(1, 4, 40)
    x[0, 1, 3], x[0, 2, 5] = math.nan, math.inf
    values, scales = quantize_rows(x)
    given = data(1, 4, 9, 40)
    y = fused_linear(**{**given, "x": values, "x_scale": scales})
    assert torch.equal(y.isnan().all(dim=2)[0], torch.tensor([False, True, True, False]))
    assert torch.equal(y.isnan().any(dim=2)[0], torch.tensor([False, True, True, False]))


def test_strides_empty_and_the_default_type() -> None:
    given = data(2, 20, 70, 40)
    want = fused_linear(**given)
    assert want.dtype == torch.bfloat16
    odd = {"x": given["x"].permute(2, 1, 0).contiguous().permute(2, 1, 0), "weight": given["weight"].T.contiguous().T}
    assert torch.equal(fused_linear(**{**given, **odd, "x_scale": given["x_scale"].T.contiguous().T}), want)
    for images, rows in ((0, 3), (2, 0)):
        none = {name: given[name][:images, :rows] for name in ("x", "x_scale", "residual")}
        none = {name: t if images else t.new_empty(0, rows, *t.shape[2:]) for name, t in none.items()}
        y, moments = fused_linear(**{**given, **none}, emit_moments=True)
        assert y.shape == (images, rows, 70) and moments.shape == (images, rows, 2, 2)


def test_opcheck_and_one_graph() -> None:
    given = data(2, 5, 70, 40)
    parts = (given[name] for name in ("x", "weight", "bias"))
    rest = (None, None, 1e-6, None, None, "gelu", given["residual"], True, torch.bfloat16)
    scales = (given["x_scale"], given["weight_scale"])
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # the others do arithmetic
    operator = torch.ops.dcar_fast.fused_linear.default
    torch.library.opcheck(operator, (*parts, *rest, *scales, None), test_utils=tests)
    compiled = torch.compile(lambda **how: fused_linear(**how, activation="gelu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), fused_linear(**given, activation="gelu"))


GIVEN = data(2, 3, 5, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": GIVEN["x"].float()}, "x is torch.float32, allowed is the type of weight, torch.float8_e4m3fn"),
        ({"x": GIVEN["x"][0]}, r"x has shape \(3, 96\), allowed is \(B, N, K\)"),
        ({"x": GIVEN["x"].view(torch.float8_e5m2)}, "x is torch.float8_e5m2, allowed is the type of weight"),
        ({"weight": GIVEN["weight"].view(torch.float8_e5m2)}, "x_scale is given, allowed is None unless weight is"),
        ({"weight": GIVEN["weight"].float()}, "x_scale is given, allowed is None unless weight is torch.float8_e4m3fn"),
        ({"weight": GIVEN["weight"][None]}, r"weight has shape \(1, 5, 96\), allowed is \(V, 96\)"),
        ({"x_scale": None}, r"x_scale is a NoneType, allowed is a tensor \(2, 3\)"),
        ({"weight_scale": None}, r"weight_scale is a NoneType, allowed is a tensor \(5\)"),
        ({"x_scale": torch.ones(3, 2)}, r"x_scale has shape \(3, 2\), allowed is \(2, 3\)"),
        ({"weight_scale": torch.ones(5).bfloat16()}, "weight_scale is torch.bfloat16, allowed is torch.float32"),
        ({"weight_scale": torch.ones(5, device="meta")}, "weight_scale is on meta, allowed is the device of x, cpu"),
        ({"bias": torch.ones(5)}, "bias is torch.float32, allowed is the type of the result, torch.bfloat16"),
        ({"out_dtype": torch.float16}, "bias is torch.bfloat16, allowed is the type of the result, torch.float16"),
        ({"out_dtype": torch.float64}, "out_dtype is torch.float64, allowed are torch.float32, torch.float16"),
        ({"moments": torch.zeros(2, 3, 2, 2)}, "moments is given, allowed is None with torch.float8_e4m3fn"),
        (
            {"lengths": torch.tensor([1, 2]), "group": 16},
            "lengths is given, allowed is None with torch.float8_e4m3fn",
        ),
        ({"backend": "native"}, "backend is 'native', which cannot run fused_linear"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_linear(**{**GIVEN, **change})


def test_gpus_without_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton runs but not on float8, "auto" takes the reference and a request for Triton is refused."""
    able, unable = _dispatch.Usable(True, "yes"), _dispatch.Usable(False, "too old")
    backends = tuple(_dispatch.Backend(name, lambda: None, lambda _: able) for name in ("triton", "reference"))
    monkeypatch.setitem(_dispatch._ops, "made up", backends)
    device = torch.device("cpu")
    monkeypatch.setattr(_dispatch, "float8_usable", lambda _: able)
    assert _dispatch.choose_float8("made up", device, None).name == "triton"
    monkeypatch.setattr(_dispatch, "float8_usable", lambda _: unable)
    assert _dispatch.choose_float8("made up", device, None).name == "reference"
    assert _dispatch.choose_float8("made up", device, "reference").name == "reference"
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run made up on cpu: too old"):
        _dispatch.choose_float8("made up", device, "triton")
    monkeypatch.setenv("DCAR_FAST_BACKEND", "triton")
    with pytest.raises(ValueError, match="which cannot run made up on cpu: too old"):
        _dispatch.choose_float8("made up", device, None)
