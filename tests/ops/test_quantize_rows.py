"""Every implementation of quantize_rows against float64 and the numbers that e4m3 has; bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.ops import _dispatch, quantize_rows
from dcar_fast.ops._dispatch import launches
from dcar_fast.reference._moments import row_moments
from tests.ops.float8_cases import FLOAT8, LARGEST, NUMBERS, nearest, steps_off
from tests.ops.sampling_cases import normals

pytestmark = pytest.mark.usefixtures("poisoned_empty")

LOW = [torch.float32, torch.float16, torch.bfloat16]
HERE = ["reference", None]
GPU = ["reference", "triton", None]
SHAPES = [(1, 1, 1), (2, 3, 7), (3, 5, 64), (1, 9, 65), (2, 6, 1152)]
SMALLEST = 2.0**-126


def check(x: Tensor, backend: str | None, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of finite numbers: scales are exact up to one rounding, values the nearest there are."""
    values, scales = quantize_rows(x.to(device), backend=backend)
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (FLOAT8, x.shape, torch.float32, x.shape[:2])
    assert values.is_contiguous() and scales.is_contiguous()
    values, scales = values.float().cpu(), scales.cpu()
    wide = x.double()
    largest = wide.abs().amax(dim=2)
    exact = torch.where(largest == 0, 1.0, (largest / LARGEST).clamp(min=SMALLEST))
    assert torch.equal(scales, exact.float())
    # the quotient is rounded to float32 first, which may make a tie of what is next to one
    assert steps_off(values, wide / scales.double()[..., None]).max() < 1e-6
    return values, scales


def check_normed(x: Tensor, eps: float, backend: str | None, device: str = "cpu") -> None:
    """LayerNorm before it: the same up to the rounding of mean and deviation."""
    moments = row_moments(x).to(device)
    values, scales = (t.cpu() for t in quantize_rows(x.to(device), moments=moments, eps=eps, backend=backend))
    normed = F.layer_norm(x.double(), x.shape[2:], eps=eps)
    exact = (normed.abs().amax(dim=2) / LARGEST).clamp(min=SMALLEST)
    assert ((scales.double() - exact).abs() <= 1e-5 * exact).all()
    assert steps_off(values.float(), normed / scales.double()[..., None]).max() < 1e-4


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees(shape: tuple[int, ...], dtype: torch.dtype, backend: str | None) -> None:
    check((normals(*shape) * 3 + 0.5).to(dtype), backend)
    if shape[2] > 7:
        check_normed((normals(*shape) * 3 + 0.5).to(dtype), 1e-6, backend)
        check_normed((normals(*shape) + 30).to(dtype), 0.1, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 256, 4608), (1, 3, 65_536)])
def test_float64_agrees_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, backend: str | None) -> None:
    needs_float8(backend)
    x = (normals(*shape) * 3 + 0.5).to(dtype)
    check(x, backend, "cuda")
    if shape[2] > 7:
        check_normed(x, 1e-6, backend, "cuda")
    want = quantize_rows(x.cuda(), backend="reference")
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(quantize_rows(x.cuda()), want, strict=True))


def needs_float8(backend: str | None) -> None:
    usable = _dispatch.float8_usable(torch.device("cuda", 0))
    if backend == "triton" and not usable.ok:
        pytest.skip(usable.reason)


def between() -> Tensor:
    """(1, 1, K): every number of e4m3, what is in the middle of two, and what is next to that; the largest is 448, so
    that the scale is 1."""
    low, high = NUMBERS[:-1], NUMBERS[1:]
    middle = (low + high).float() / 2
    parts = [NUMBERS.float(), middle, *(torch.nextafter(middle, end.float()) for end in (low, high))]
    row = torch.cat(parts)
    return torch.cat((row, -row))[None, None]


def check_rounding(backend: str, device: str) -> None:
    x = between()
    values, scales = quantize_rows(x.to(device), backend=backend)
    assert scales.item() == 1 and torch.equal(values.cpu().double(), nearest(x.double()))


def test_ties_go_to_even() -> None:
    check_rounding("reference", "cpu")
    assert nearest(torch.tensor([2.0**-10, 3 * 2.0**-10, 440.0, -1.0625])).tolist() == [0, 2.0**-8, 448, -1.0]


@pytest.mark.gpu
def test_ties_go_to_even_on_a_gpu() -> None:
    needs_float8("triton")
    check_rounding("triton", "cuda")


def odd_rows() -> Tensor:
    """(1, 8, 70): zeros, the smallest numbers, the largest, NaN, infinities, both, and one that is as it should be."""
    x = normals(1, 8, 70)
    x[0, 0], x[0, 1], x[0, 2] = 0, x[0, 1] * 1e-44, 0
    x[0, 2, 3], x[0, 2, 4] = torch.finfo(torch.float32).max, -1e38
    x[0, 3, 5], x[0, 4, 69], x[0, 5, 0] = math.nan, math.inf, -math.inf
    x[0, 6, 1], x[0, 6, 2] = math.nan, math.inf
    return x


def check_odd(backend: str, device: str) -> None:
    x = odd_rows()
    values, scales = (t.cpu() for t in quantize_rows(x.to(device), backend=backend))
    bad = slice(3, 7)
    assert scales[0, bad].isnan().all() and values.float()[0, bad].isnan().all()
    assert scales[0, 0] == 1 and not values.float()[0, 0].any() and scales[0, 1] == SMALLEST
    good = [0, 1, 2, 7]
    check(x[:, good], backend, device)
    alone, alone_scales = (t.cpu() for t in quantize_rows(x[:, good].to(device), backend=backend))
    assert torch.equal(alone.float(), values.float()[:, good]) and torch.equal(alone_scales, scales[:, good])
    normed = quantize_rows(x.to(device), moments=row_moments(x).to(device), backend=backend)
    assert all(t[0, bad].float().isnan().all() for t in normed)
    assert torch.equal(normed[1].isnan().cpu(), scales.isnan())


def test_rows_that_are_not_finite_and_rows_of_zeros() -> None:
    check_odd("reference", "cpu")


@pytest.mark.gpu
def test_rows_that_are_not_finite_and_rows_of_zeros_on_a_gpu() -> None:
    needs_float8("triton")
    check_odd("triton", "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_largest_of_16_bits(dtype: torch.dtype) -> None:
    x = torch.tensor([[[torch.finfo(dtype).max, -torch.finfo(dtype).max, torch.finfo(dtype).tiny, 0]]], dtype=dtype)
    values, _ = check(x, None)
    assert values.tolist() == [[[LARGEST, -LARGEST, 0, 0]]]


def test_float64_is_computed_in_float64() -> None:
    x = normals(2, 9, 65, dtype=torch.float64)
    check(x, None)
    check_normed(x, 1e-6, None)


def test_the_given_moments_are_what_is_used() -> None:
    x = normals(2, 5, 70)
    want, _ = quantize_rows(x, moments=row_moments(x))
    other = row_moments(x)
    other[..., 0] += 1
    assert (quantize_rows(x, moments=other)[0].float() - want.float()).abs().max() > 50


def test_strides_and_empty() -> None:
    x = normals(2, 20, 40)
    want = quantize_rows(x, moments=row_moments(x))
    got = quantize_rows(x.permute(2, 1, 0).contiguous().permute(2, 1, 0), moments=row_moments(x))
    assert all(torch.equal(a.float(), b.float()) and a.is_contiguous() for a, b in zip(got, want, strict=True))
    for images, rows in ((0, 3), (2, 0)):
        values, scales = quantize_rows(torch.ones(images, rows, 40))
        assert values.shape == (images, rows, 40) and scales.shape == (images, rows)


def test_many_rows() -> None:
    check(normals(65_537, 1, 3), None)


def test_opcheck() -> None:
    x, operator = normals(2, 5, 70), torch.ops.dcar_fast.quantize_rows.default
    torch.library.opcheck(operator, (x, None, 1e-6, None))
    torch.library.opcheck(operator, (x, row_moments(x), 1e-6, None))


def test_compiles_as_one_graph_and_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values, scales = quantize_rows(x + 1)
            return values.float() * scales[..., None]

    inputs = (normals(2, 5, 40),)
    want = Layer()(*inputs)
    assert (want - inputs[0] - 1).abs().max() < 0.2
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Layer(), inputs)
    for call in (compiled, exported.module()):
        assert torch.equal(call(*inputs), want)
    assert torch.ops.dcar_fast.quantize_rows.default in [node.target for node in exported.graph.nodes]


def test_launches_are_declared() -> None:
    assert launches("quantize_rows") == 1


X = torch.zeros(2, 3, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x has shape \(3, 96\), allowed is \(B, N, K\)"),
        ({"x": X.long()}, "x is torch.int64, allowed are torch.float32"),
        ({"x": X.to(FLOAT8)}, "x is torch.float8_e4m3fn, allowed are torch.float32"),
        ({"x": X[:, :, :0]}, r"x has shape \(2, 3, 0\), allowed is \(B, N, K\) with K in 1..65536"),
        ({"x": torch.zeros(1, 1, 65_537)}, r"x has shape \(1, 1, 65537\), allowed is \(B, N, K\) with K in 1..65536"),
        ({"moments": torch.zeros(2, 3, 1, 2)}, r"moments has shape \(2, 3, 1, 2\), allowed is \(2, 3, 2, 2\)"),
        ({"moments": torch.zeros(2, 3, 2, 2).half()}, "moments is torch.float16, allowed is torch.float32"),
        ({"moments": torch.zeros(2, 3, 2, 2, device="meta")}, "moments is on meta, allowed is the device of x, cpu"),
        ({"eps": -1.0}, "eps is -1.0, allowed is a finite number >= 0"),
        ({"x": X.clone().requires_grad_()}, "x requires a gradient, which quantize_rows does not have"),
        ({"backend": "native"}, "backend is 'native', which cannot run quantize_rows"),
        (
            {"backend": "triton"},
            "backend is 'triton', which cannot run quantize_rows on cpu: Triton kernels run on CUDA",
        ),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_rows(**{"x": X, **change})


def test_gpus_without_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judgement, on GPUs that are made up."""
    able = _dispatch.Usable(True, "triton is installed")
    monkeypatch.setattr(_dispatch, "triton_usable", lambda device: able)
    device = torch.device("cuda", 0)
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert _dispatch.float8_usable(device) == able
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    refused = _dispatch.float8_usable(device)
    assert not refused.ok and refused.reason == "float8 needs compute capability (8, 9), cuda:0 has (8, 6)"
