"""Every implementation of relu_linear_attention against the formula in float64, query by query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.ops import relu_linear_attention
from dcar_fast.reference.relu_linear_attention import relu_linear_attention as reference
from tests.ops.image_cases import DTYPES, LAYOUTS, check_format, lay_out, normals
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HERE = ["reference", None]
GPU = ["reference", "triton", None]
SHAPES = [(1, 1, 1, 1), (2, 2, 3, 5), (1, 3, 4, 8), (1, 1, 3, 11), (2, 1, 9, 15), (1, 2, 25, 41)]  # (B, heads, H, W)


def spelled_out(qkv: Tensor) -> Tensor:
    """Attention weights relu(q) . relu(k), divided by their sum over the keys; float64."""
    batch, inner, height, width = qkv.shape
    q, k, v = qkv.double().reshape(batch, inner // 96, 3, 32, height * width).unbind(2)
    weights = torch.einsum("bhdq,bhdk->bhqk", q.clamp(min=0), k.clamp(min=0))
    out = torch.einsum("bhqk,bhdk->bhdq", weights, v) / (weights.sum(3)[:, :, None] + 1e-15)
    return out.reshape(batch, inner // 3, height, width)


def data(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    batch, heads, height, width = shape
    return normals(batch, 96 * heads, height, width, seed=height * width).to(dtype)


def compare(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    qkv = data(shape, dtype)
    plain, truth = reference(qkv), spelled_out(qkv)
    for layout in LAYOUTS:
        got = relu_linear_attention(lay_out(qkv.to(device), layout), backend=backend)
        check_close(got.cpu(), plain, truth, layout)
        check_format(got, layout)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(backend, dtype, shape, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (65537, 1, 1, 2), (2, 32, 16, 16), (1, 1, 72, 73)])
def test_float64_agrees_on_a_gpu(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(backend, dtype, shape, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2, 5, 6), (2, 2, 40, 41)])
def test_kernels_repeat_themselves_whatever_the_batch(shape: tuple[int, ...]) -> None:
    qkv = data(shape, torch.bfloat16).cuda()
    want = relu_linear_attention(qkv, backend="triton")
    for _ in range(20):
        assert torch.equal(relu_linear_attention(qkv, backend="triton"), want)
    assert torch.equal(relu_linear_attention(qkv[1:], backend="triton"), want[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("side", [4, 30])
def test_kernels_are_more_exact_than_the_reference_in_bfloat16(side: int) -> None:
    qkv = data((1, 4, side, side), torch.bfloat16)
    truth = spelled_out(qkv)
    got = relu_linear_attention(qkv.cuda(), backend="triton").cpu()
    assert (got - truth).abs().max() < 0.7 * (reference(qkv) - truth).abs().max()


def unusual(backend: str | None, device: str) -> None:
    """Sums beyond float16's range; NaN and infinity in each of q, k and v; nothing positive at all."""
    for height, width in ((4, 8), (5, 9)):
        loud = (60 * data((1, 1, height, width), torch.float32)).half()
        check_close(relu_linear_attention(loud.to(device), backend=backend).cpu(), reference(loud), spelled_out(loud))
        for channel in (3, 40, 70):
            for value in (float("nan"), float("inf"), -float("inf")):
                qkv = data((2, 2, height, width), torch.float32)
                qkv[1, 96 + channel, 1, 2] = value
                got = relu_linear_attention(lay_out(qkv.to(device), "channels_last"), backend=backend).cpu()
                check_close(got, reference(qkv), reference(qkv.double()), f"{value} in channel {channel}")
                assert got[0].isfinite().all() and got[1, :32].isfinite().all()
        silent = -data((1, 2, height, width), torch.float32).abs() - 0.1
        assert (relu_linear_attention(silent.to(device), backend=backend) == 0).all()


@pytest.mark.parametrize("backend", HERE)
def test_overflow_nan_infinity_and_silence(backend: str | None) -> None:
    unusual(backend, "cpu")


@pytest.mark.gpu
def test_overflow_nan_infinity_and_silence_on_a_gpu() -> None:
    unusual("triton", "cuda")


def test_reference_keeps_float64() -> None:
    for shape in ((2, 2, 3, 4), (1, 1, 7, 9)):
        qkv = data(shape, torch.float64)
        got = relu_linear_attention(qkv)
        assert got.dtype == torch.float64 and (got - spelled_out(qkv)).abs().max() < 1e-13


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", [(0, 96, 8, 8), (0, 96, 2, 2), (2, 192, 0, 2)])
def test_empty(backend: str | None, shape: tuple[int, ...]) -> None:
    got = relu_linear_attention(torch.zeros(shape).half(), backend=backend)
    assert (got.shape, got.dtype) == ((shape[0], shape[1] // 3, *shape[2:]), torch.float16)


def test_torch_sees_one_operation() -> None:
    for shape in ((2, 1, 3, 5), (1, 2, 6, 7)):
        for layout in ("contiguous", "channels_last", "channels_last slice", "cutout"):
            arguments = (lay_out(data(shape, torch.float32), layout), None)
            torch.library.opcheck(torch.ops.dcar_fast.relu_linear_attention.default, arguments)


def test_compile_and_export() -> None:
    class Attention(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return relu_linear_attention(qkv) * 2

    arguments = (lay_out(data((2, 1, 6, 7), torch.float32), "channels_last"),)
    want = Attention()(*arguments)
    assert torch.equal(torch.compile(Attention(), fullgraph=True, backend="aot_eager")(*arguments), want)
    exported = torch.export.export(Attention(), arguments)
    assert torch.equal(exported.module()(*arguments), want)
    assert any("dcar_fast.relu_linear_attention" in str(node.target) for node in exported.graph.nodes)


QKV = torch.ones(2, 96, 3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": QKV[0]}, r"qkv has shape \(96, 3, 5\), allowed is \(B, 3C, H, W\)"),
        ({"qkv": QKV[:, :93]}, "qkv has 93 channels, allowed are positive multiples of 96"),
        ({"qkv": QKV[:, :0]}, "qkv has 0 channels, allowed are positive multiples of 96"),
        ({"qkv": QKV.long()}, "qkv is torch.int64, allowed are torch.float32"),
        ({"qkv": None}, "qkv is a NoneType, allowed is a tensor"),
        ({"qkv": QKV.clone().requires_grad_()}, "qkv requires a gradient, which relu_linear_attention does not have"),
        ({"backend": "triton"}, "backend is 'triton', which cannot run relu_linear_attention on cpu"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relu_linear_attention(**{"qkv": QKV, **change})


@pytest.mark.gpu
def test_kernels_refuse_float64() -> None:
    with pytest.raises(
        ValueError, match="backend is 'triton', which cannot run relu_linear_attention on torch.float64"
    ):
        relu_linear_attention(QKV.double().cuda(), backend="triton")


def test_inputs_that_require_grad_pass_under_no_grad() -> None:
    with torch.no_grad():
        assert not relu_linear_attention(QKV.clone().requires_grad_()).requires_grad
