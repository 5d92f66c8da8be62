"""Every implementation of channel_norm against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.models.autoencoder import LayerNorm2d
from dcar_fast.ops import channel_norm
from dcar_fast.reference.channel_norm import channel_norm as reference
from tests.ops.image_cases import DTYPES, LAYOUTS, check_format, lay_out, normals
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HERE = ["reference", None]
GPU = ["reference", "triton", None]
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 33, 1, 9), (2, 256, 4, 3), (1, 1030, 2, 3)]


def spelled_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    activation: str,
    eps: float = 1e-5,
    centred: bool = True,
) -> Tensor:
    x = x - x.mean(1, keepdim=True) if centred else x
    out = x / (x.square().mean(1, keepdim=True) + eps).sqrt()
    out = out * weight[:, None, None] + bias[:, None, None]
    out = {"none": out, "relu": out.relu(), "silu": out * out.sigmoid()}[activation]
    return out if residual is None else residual + out


def check(
    got: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    activation: str,
    centred: bool = True,
) -> None:
    def at(dtype: torch.dtype) -> Tensor:
        values = (None if value is None else value.cpu().to(dtype) for value in (x, weight, bias, residual))
        return spelled_out(*values, activation, centred=centred)

    check_close(got.cpu(), at(torch.float32).to(got.dtype), at(torch.float64), f"{activation} {x.shape}")


def compare(backend: str | None, dtype: torch.dtype, layout: str, shape: tuple[int, ...], device: str) -> None:
    weight, bias = (normals(shape[1], seed=seed, dtype=dtype).to(device) for seed in (1, 2))
    for activation, with_residual, centred in (
        ("none", True, True),
        ("relu", False, True),
        ("silu", True, True),
        ("none", True, False),
        ("relu", False, False),
    ):
        x = lay_out((3 * normals(*shape) + 1).to(device, dtype), layout)
        residual = lay_out(normals(*shape, seed=3).to(device, dtype), layout) if with_residual else None
        settings = {"residual": residual, "activation": activation, "centred": centred}
        got = channel_norm(x, weight, bias, **settings, backend=backend)
        check(got, x, weight, bias, residual, activation, centred)
        check_format(got, layout)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for layout in LAYOUTS:
        compare(backend, dtype, layout, shape, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (65537, 5, 1, 1), (1, 64, 1, 65537), (2, 1024, 16, 16)])
def test_float64_agrees_on_a_gpu(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for layout in LAYOUTS:
        compare(backend, dtype, layout, shape, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernels_treat_nan_as_pytorch_does(layout: str) -> None:
    nan_and_infinity("triton", layout, "cuda")


@pytest.mark.parametrize("backend", HERE)
def test_nan_and_infinity_stay_in_their_pixel(backend: str | None) -> None:
    nan_and_infinity(backend, "contiguous", "cpu")


def nan_and_infinity(backend: str | None, layout: str, device: str) -> None:
    x, weight, bias = normals(1, 6, 3, 4), normals(6, seed=1), normals(6, seed=2)
    x[0, 1, 0, 0], x[0, 2, 1, 1], x[0, 3, 2, 2] = float("nan"), float("inf"), -float("inf")
    x = lay_out(x.to(device), layout)
    for activation in ("none", "relu", "silu"):
        got = channel_norm(x, weight.to(device), bias.to(device), activation=activation, backend=backend)
        check(got, x, weight, bias, None, activation)
        assert got[0, :, [0, 1, 2], [0, 1, 2]].isnan().all() and got.isnan().sum() == 18


@pytest.mark.parametrize("backend", HERE)
def test_the_ends_of_float16(backend: str | None) -> None:
    """Squares leave float16's range, and equal channels leave nothing but the bias."""
    x = torch.tensor([60000.0, -60000.0, 65504.0, 0.0]).half().view(1, 4, 1, 1).expand(2, 4, 3, 2).clone()
    x[1] = 7.0
    weight, bias = normals(4, seed=1).half(), normals(4, seed=2).half()
    got = channel_norm(x, weight, bias, backend=backend)
    check(got, x, weight, bias, None, "none")
    assert torch.equal(got[1], bias[:, None, None].expand(4, 3, 2))


def test_mean_far_from_zero() -> None:
    x, ones, zeros = normals(1, 64, 3, 3) + 1e4, torch.ones(64), torch.zeros(64)
    check(channel_norm(x, ones, zeros), x, ones, zeros, None, "none")


def test_weights_may_have_another_type_than_the_image() -> None:
    x, weight, bias = normals(1, 8, 3, 3, dtype=torch.bfloat16), normals(8, seed=1), normals(8, seed=2)
    got = channel_norm(x, weight, bias)
    check(got, x, weight, bias, None, "none")


def test_model_agrees() -> None:
    norm = LayerNorm2d(6, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x, residual = normals(2, 6, 3, 4).double(), normals(2, 6, 3, 4, seed=1).double()
    with torch.no_grad():
        got = reference(x, norm.weight, norm.bias, residual=residual, activation="relu", eps=1e-3)
        assert (got - residual - F.relu(norm(x))).abs().max() < 1e-14 and got.dtype == torch.float64
        assert torch.equal(got, channel_norm(x, norm.weight, norm.bias, residual=residual, activation="relu", eps=1e-3))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 4, 0, 2)])
def test_empty(backend: str | None, shape: tuple[int, ...]) -> None:
    got = channel_norm(torch.zeros(shape).half(), torch.ones(4), torch.ones(4), backend=backend)
    assert (got.shape, got.dtype) == (shape, torch.float16)


def test_torch_sees_one_operation() -> None:
    x, weight, bias = normals(2, 6, 4, 5), normals(6, seed=1), normals(6, seed=2)
    for image in (x, lay_out(x, "channels_last"), lay_out(x, "channels_last slice"), lay_out(x, "cutout")):
        arguments = (image, weight, bias, image, "silu", 1e-5, True, None)
        torch.library.opcheck(torch.ops.dcar_fast.channel_norm.default, arguments)


def test_compile_and_export() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return channel_norm(x, weight, bias, residual=x, activation="relu") * 2

    arguments = (lay_out(normals(2, 6, 4, 5), "channels_last"), normals(6, seed=1), normals(6, seed=2))
    want = Norm()(*arguments)
    assert torch.equal(torch.compile(Norm(), fullgraph=True, backend="aot_eager")(*arguments), want)
    exported = torch.export.export(Norm(), arguments)
    assert torch.equal(exported.module()(*arguments), want)
    assert any("dcar_fast.channel_norm" in str(node.target) for node in exported.graph.nodes)


X, W = torch.ones(2, 4, 3, 5), torch.ones(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x has shape \(4, 3, 5\), allowed is \(B, C, H, W\)"),
        ({"x": X.long()}, "x is torch.int64, allowed are torch.float32, torch.float16, torch.bfloat16, torch.float64"),
        ({"x": X[:, :0]}, r"x has shape \(2, 0, 3, 5\), allowed is \(B, C, H, W\) with C at least 1"),
        ({"weight": W[:3]}, r"weight has shape \(3,\), allowed is \(4\)"),
        ({"weight": W.bool()}, "weight is torch.bool"),
        ({"bias": W.to("meta")}, "bias is on meta, allowed is the device of x, cpu"),
        ({"bias": None}, r"bias is a NoneType, allowed is a tensor \(4\)"),
        ({"residual": X[:1]}, r"residual has shape \(1, 4, 3, 5\), allowed is \(2, 4, 3, 5\)"),
        ({"residual": X.half()}, "residual is torch.float16, allowed is the type of x, torch.float32"),
        ({"activation": "gelu"}, "activation is 'gelu', allowed are 'none', 'relu', 'silu'"),
        ({"centred": 1}, "centred is 1, allowed are True and False"),
        ({"eps": -1.0}, "eps is -1.0, allowed is a finite number >= 0"),
        ({"eps": float("nan")}, "eps is nan, allowed is a finite number >= 0"),
        ({"x": X.clone().requires_grad_()}, "x requires a gradient, which channel_norm does not have"),
        ({"weight": W.clone().requires_grad_()}, "weight requires a gradient"),
        ({"residual": X.clone().requires_grad_()}, "residual requires a gradient"),
        ({"backend": "triton"}, "backend is 'triton', which cannot run channel_norm on cpu"),
        ({"backend": "native"}, "channel_norm has no native implementation"),
        ({"backend": "fast"}, "backend is 'fast', allowed are"),
        ({"x": X.double(), "backend": "triton"}, "backend is 'triton', which cannot run channel_norm on cpu"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        channel_norm(**{"x": X, "weight": W, "bias": W, **change})


@pytest.mark.gpu
def test_kernels_refuse_float64() -> None:
    x, weight = X.double().cuda(), W.double().cuda()
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run channel_norm on torch.float64"):
        channel_norm(x, weight, weight, backend="triton")
    assert channel_norm(x, weight, weight).dtype == torch.float64


def test_inputs_that_require_grad_pass_under_no_grad() -> None:
    with torch.no_grad():
        assert not channel_norm(X.clone().requires_grad_(), W, W).requires_grad
