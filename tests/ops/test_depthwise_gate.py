"""Every implementation of depthwise_gate against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.models.autoencoder import GLUMBConv
from dcar_fast.ops import depthwise_gate
from tests.ops.image_cases import DTYPES, LAYOUTS, check_format, lay_out, normals, uniforms
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HERE = ["reference", None]
GPU = ["reference", "triton", None]
SHAPES = [(3, 2, 1, 1), (2, 6, 5, 7), (1, 70, 1, 9), (1, 34, 9, 2), (1, 4, 17, 19)]  # (B, 2C, H, W)


def act(x: Tensor, activation: str) -> Tensor:
    return x.relu() if activation == "relu" else x * x.sigmoid()


def spelled_out(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """Nine shifted images, weighted and summed."""
    height, width = x.shape[2:]
    padded = F.pad(act(x, activation), (1, 1, 1, 1))
    y = bias[:, None, None].expand(x.shape)
    for row in range(3):
        for column in range(3):
            tap = weight[:, 0, row, column][:, None, None]
            y = y + tap * padded[:, :, row : row + height, column : column + width]
    value, gate = y.chunk(2, dim=1)
    return value * act(gate, activation)


def check(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> None:
    x, weight, bias = x.cpu(), weight.cpu(), bias.cpu()
    y = F.conv2d(act(x.float(), activation), weight.float(), bias.float(), padding=1, groups=x.shape[1])
    plain = (y.chunk(2, dim=1)[0] * act(y.chunk(2, dim=1)[1], activation)).to(got.dtype)
    truth = spelled_out(x.double(), weight.double(), bias.double(), activation)
    check_close(got.cpu(), plain, truth, f"{activation} {x.shape}")


def parameters(channels: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    weight = uniforms(-0.2, 0.8, channels, 1, 3, 3, seed=1, dtype=dtype)
    bias = normals(channels, seed=2, dtype=dtype)
    return weight.to(device), bias.to(device)


def compare(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    weight, bias = parameters(shape[1], dtype, device)
    x = uniforms(-1, 3, *shape).to(device, dtype)
    for layout in LAYOUTS:
        for activation in ("silu", "relu"):
            got = depthwise_gate(lay_out(x, layout), weight, bias, activation=activation, backend=backend)
            check(got, x, weight, bias, activation)
            check_format(got, layout)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(backend, dtype, shape, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (65537, 2, 1, 1), (2, 1024, 16, 16), (1, 520, 33, 66)])
def test_float64_agrees_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    compare(backend, dtype, shape, "cuda")


def unusual(backend: str | None, device: str) -> None:
    """What is not finite reaches its neighbours and nothing else; float16 overflows where it must."""
    x = uniforms(-1, 3, 1, 4, 5, 6)
    x[0, 0, 1, 1], x[0, 1, 3, 3], x[0, 2, 4, 5], x[0, 3, 0, 5] = float("nan"), float("inf"), -float("inf"), 1e4
    weight, bias = parameters(4, torch.float32)
    for dtype in (torch.float32, torch.float16):
        for layout in ("contiguous", "channels_last"):
            for activation in ("silu", "relu"):
                image = lay_out(x.to(device, dtype), layout)
                got = depthwise_gate(image, weight.to(device), bias.to(device), activation=activation, backend=backend)
                check(got, image, weight, bias, activation)
                assert got.isnan().any() and got[0, 1, 0, :4].isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_nan_infinity_and_the_end_of_float16(backend: str | None) -> None:
    unusual(backend, "cpu")


@pytest.mark.gpu
def test_nan_infinity_and_the_end_of_float16_on_a_gpu() -> None:
    unusual("triton", "cuda")


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_model_agrees(activation: str) -> None:
    block, x = GLUMBConv(4, "layer_norm", activation).double(), normals(2, 4, 5, 3).double()
    with torch.no_grad():
        inner = depthwise_gate(block.inverted(x), block.depthwise.weight, block.depthwise.bias, activation=activation)
        assert inner.dtype == torch.float64
        assert (block.norm(block.pointwise(inner)) - block(x)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
def test_empty(backend: str | None, shape: tuple[int, ...]) -> None:
    got = depthwise_gate(torch.zeros(shape).half(), *parameters(4, torch.float16), backend=backend)
    assert (got.shape, got.dtype) == ((shape[0], 2, *shape[2:]), torch.float16)


def test_weights_may_lie_tap_by_tap_and_in_another_type() -> None:
    x, (weight, bias) = normals(1, 6, 4, 5, dtype=torch.bfloat16), parameters(6, torch.float32)
    by_tap = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    assert by_tap.stride() == (1, 54, 18, 6)
    check(depthwise_gate(x, by_tap, bias), x, weight, bias, "silu")


def test_torch_sees_one_operation() -> None:
    x, (weight, bias) = normals(2, 6, 4, 5), parameters(6, torch.float32)
    for layout in ("contiguous", "channels_last", "channels_last slice", "cutout"):
        arguments = (lay_out(x, layout), weight, bias, "silu", None)
        torch.library.opcheck(torch.ops.dcar_fast.depthwise_gate.default, arguments)


def test_compile_and_export() -> None:
    class Gate(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return depthwise_gate(x, weight, bias) * 2

    arguments = (lay_out(normals(2, 6, 4, 5), "channels_last"), *parameters(6, torch.float32))
    want = Gate()(*arguments)
    assert torch.equal(torch.compile(Gate(), fullgraph=True, backend="aot_eager")(*arguments), want)
    exported = torch.export.export(Gate(), arguments)
    assert torch.equal(exported.module()(*arguments), want)
    assert any("dcar_fast.depthwise_gate" in str(node.target) for node in exported.graph.nodes)


X, W, B = torch.ones(2, 4, 3, 5), torch.ones(4, 1, 3, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x has shape \(4, 3, 5\), allowed is \(B, 2C, H, W\)"),
        ({"x": X[:, :3]}, "x has 3 channels, allowed are positive even numbers"),
        ({"x": X[:, :0]}, "x has 0 channels, allowed are positive even numbers"),
        ({"x": X.long()}, "x is torch.int64, allowed are torch.float32"),
        ({"weight": W[:, 0]}, r"weight has shape \(4, 3, 3\), allowed is \(4, 1, 3, 3\)"),
        ({"weight": W[..., :1]}, r"weight has shape \(4, 1, 3, 1\), allowed is \(4, 1, 3, 3\)"),
        ({"weight": W.to("meta")}, "weight is on meta, allowed is the device of x, cpu"),
        ({"bias": None}, "bias is a NoneType, allowed is a tensor"),
        ({"bias": B[:2]}, r"bias has shape \(2,\)"),
        ({"bias": B.int()}, "bias is torch.int32"),
        ({"activation": "none"}, "activation is 'none', allowed are 'silu', 'relu'"),
        ({"x": X.clone().requires_grad_()}, "x requires a gradient, which depthwise_gate does not have"),
        ({"weight": W.clone().requires_grad_()}, "weight requires a gradient"),
        ({"bias": B.clone().requires_grad_()}, "bias requires a gradient"),
        ({"backend": "triton"}, "backend is 'triton', which cannot run depthwise_gate on cpu"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depthwise_gate(**{"x": X, "weight": W, "bias": B, **change})


@pytest.mark.gpu
def test_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run depthwise_gate on torch.float64"):
        depthwise_gate(X.double().cuda(), W.cuda(), B.cuda(), backend="triton")


def test_inputs_that_require_grad_pass_under_no_grad() -> None:
    with torch.no_grad():
        assert not depthwise_gate(X.clone().requires_grad_(), W, B).requires_grad
