"""Every implementation of bias_residual against the formula: bit-equal sums, silu against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcar_fast.models.autoencoder import ResBlock
from dcar_fast.ops import bias_residual
from dcar_fast.reference.bias_residual import bias_residual as reference
from tests.ops.image_cases import DTYPES, LAYOUTS, check_format, lay_out, normals
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HERE = ["reference", None]
GPU = ["reference", "triton", None]
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 33, 1, 9), (2, 256, 4, 3), (1, 1030, 2, 3)]
CALLS = [("none", True), ("none", False), ("relu", False), ("silu", True), ("silu", False)]


def spelled_out(x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    out = x + bias[None, :, None, None]
    out = {"none": out, "relu": out.clamp_min(0), "silu": out / (1 + (-out).exp())}[activation]
    return out if residual is None else residual + out


def check(got: Tensor, x: Tensor, bias: Tensor, residual: Tensor | None, activation: str) -> None:
    def at(dtype: torch.dtype) -> Tensor:
        values = (None if value is None else value.cpu().to(dtype) for value in (x, bias, residual))
        return spelled_out(*values, activation)

    rounded = at(torch.float32).to(got.dtype)
    if activation == "silu":
        check_close(got.cpu(), rounded, at(torch.float64), f"silu {tuple(x.shape)}")
    else:
        torch.testing.assert_close(got.cpu(), rounded, rtol=0, atol=0, equal_nan=True)


def compare(backend: str | None, dtype: torch.dtype, layout: str, shape: tuple[int, ...], device: str) -> None:
    bias = normals(shape[1], seed=1, dtype=dtype).to(device)
    for activation, with_residual in CALLS:
        x = lay_out(normals(*shape).to(device, dtype), layout)
        residual = normals(*shape, seed=3).to(device, dtype)
        for other in sorted({layout, "contiguous", "channels_last"}) if with_residual else (None,):
            added = None if other is None else lay_out(residual, other)
            got = bias_residual(x, bias, residual=added, activation=activation, backend=backend)
            check(got, x, bias, added, activation)
            check_format(got, layout)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for layout in LAYOUTS:
        compare(backend, dtype, layout, shape, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (65537, 5, 1, 1), (1, 64, 1, 65537), (2, 65537, 1, 2), (2, 1024, 16, 16)])
def test_is_the_formula_on_a_gpu(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for layout in LAYOUTS:
        compare(backend, dtype, layout, shape, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(layout: str) -> None:
    shape = (3, 256, 1024, 2733)  # the last image ends behind element 2^31
    if torch.cuda.mem_get_info()[0] < 15 << 30:
        pytest.skip("needs 15 GiB of GPU memory")
    x = torch.zeros(1, dtype=torch.bfloat16, device="cuda").expand(shape)
    x = x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    bias = torch.arange(256, dtype=torch.bfloat16, device="cuda")
    got = bias_residual(x, bias, residual=x, backend="triton")
    assert got.numel() > 2**31
    for image in got:
        assert (image == bias[:, None, None]).all()


def unusual(backend: str | None, layout: str, device: str) -> None:
    """What leaves float16's range on the way and comes back, and what is no number."""
    x, residual = torch.full((1, 4, 2, 3), 60000.0).half(), torch.full((1, 4, 2, 3), -51200.0).half()
    bias = torch.tensor([10000.0, -60000.0, 0.0, float("nan")]).half()
    x[0, 0, 0, 0], x[0, 1, 1, 1], x[0, 2, 0, 1] = float("nan"), -float("inf"), float("inf")
    residual[0, 2, 0, 1] = -float("inf")
    x, bias, residual = lay_out(x.to(device), layout), bias.to(device), lay_out(residual.to(device), layout)
    got = bias_residual(x, bias, residual=residual, backend=backend)
    check(got, x, bias, residual, "none")
    assert got[0, 0, 1, 1] == 18800 and got.isnan().sum() == 1 + 1 + 6
    for activation in ("relu", "silu"):
        got = bias_residual(x, bias, activation=activation, backend=backend)
        torch.testing.assert_close(
            got.cpu(), reference(x.cpu(), bias.cpu(), activation=activation), rtol=2**-10, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinity_nan_and_the_end_of_float16(backend: str | None, layout: str) -> None:
    unusual(backend, layout, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinity_nan_and_the_end_of_float16_on_a_gpu(layout: str) -> None:
    unusual("triton", layout, "cuda")


def test_rounds_once() -> None:
    """In bfloat16 the bias alone is lost beside x, and so is the residual: together they are not."""
    x, bias = torch.full((1, 1, 1, 1), 256.0).bfloat16(), torch.ones(1).bfloat16()
    assert bias_residual(x, bias).item() == 256
    assert bias_residual(x, bias, residual=torch.ones_like(x)).item() == 258


def test_bias_may_have_another_type_and_stride() -> None:
    x, bias = normals(1, 8, 3, 3, dtype=torch.bfloat16), normals(16, seed=1)[::2]
    for value in (bias, bias.double(), bias.half()):
        check(bias_residual(x, value, residual=x), x, value, x, "none")


def test_model_agrees() -> None:
    """The second half of a residual block whose norm is folded away."""
    torch.manual_seed(0)
    block = ResBlock(6, "batch_norm", "relu").double().eval()
    nn.init.normal_(block.norm.bias), nn.init.uniform_(block.norm.running_var, 0.5, 2.0)
    x = normals(2, 6, 5, 4).double()
    with torch.no_grad():
        scale = block.norm.weight / (block.norm.running_var + block.norm.eps).sqrt()
        y = block.conv2(block.conv1(x).relu()) * scale[:, None, None]
        got = bias_residual(y, block.norm.bias - block.norm.running_mean * scale, residual=x)
        assert got.dtype == torch.float64 and (got - block(x)).abs().max() < 1e-13


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 4, 0, 2), (2, 0, 3, 2)])
def test_empty(backend: str | None, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape).half()
    got = bias_residual(x, torch.ones(shape[1]), residual=x, backend=backend)
    assert (got.shape, got.dtype) == (shape, torch.float16)


def test_torch_sees_one_operation() -> None:
    x, bias = normals(2, 6, 4, 5), normals(6, seed=1)
    for layout in ("contiguous", "channels_last", "channels_last slice", "cutout"):
        for residual, activation in ((x, "none"), (None, "silu")):
            arguments = (lay_out(x, layout), bias, residual, activation, None)
            torch.library.opcheck(torch.ops.dcar_fast.bias_residual.default, arguments)


def test_compile_and_export() -> None:
    class After(nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return bias_residual(x, bias, residual=x, activation="silu") * 2

    arguments = (lay_out(normals(2, 6, 4, 5), "channels_last"), normals(6, seed=1))
    want = After()(*arguments)
    assert torch.equal(torch.compile(After(), fullgraph=True, backend="aot_eager")(*arguments), want)
    exported = torch.export.export(After(), arguments)
    assert torch.equal(exported.module()(*arguments), want)
    assert any("dcar_fast.bias_residual" in str(node.target) for node in exported.graph.nodes)


X, B = torch.ones(2, 4, 3, 5), torch.ones(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x has shape \(4, 3, 5\), allowed is \(B, C, H, W\)"),
        ({"x": X.long()}, "x is torch.int64, allowed are torch.float32, torch.float16, torch.bfloat16, torch.float64"),
        ({"x": None}, r"x is a NoneType, allowed is a tensor \(B, C, H, W\)"),
        ({"bias": B[:3]}, r"bias has shape \(3,\), allowed is \(4\)"),
        ({"bias": B.bool()}, "bias is torch.bool"),
        ({"bias": B.to("meta")}, "bias is on meta, allowed is the device of x, cpu"),
        ({"bias": None}, r"bias is a NoneType, allowed is a tensor \(4\)"),
        ({"residual": X[:1]}, r"residual has shape \(1, 4, 3, 5\), allowed is \(2, 4, 3, 5\)"),
        ({"residual": X.half()}, "residual is torch.float16, allowed is the type of x, torch.float32"),
        ({"residual": X.to("meta")}, "residual is on meta, allowed is the device of x, cpu"),
        ({"activation": "gelu"}, "activation is 'gelu', allowed are 'none', 'relu', 'silu'"),
        ({"x": X.clone().requires_grad_()}, "x requires a gradient, which bias_residual does not have"),
        ({"bias": B.clone().requires_grad_()}, "bias requires a gradient"),
        ({"residual": X.clone().requires_grad_()}, "residual requires a gradient"),
        ({"backend": "triton"}, "backend is 'triton', which cannot run bias_residual on cpu"),
        ({"backend": "native"}, "bias_residual has no native implementation"),
        ({"backend": "fast"}, "backend is 'fast', allowed are"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias_residual(**{"x": X, "bias": B, **change})


@pytest.mark.gpu
def test_kernels_refuse_float64() -> None:
    x, bias = X.double().cuda(), B.double().cuda()
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run bias_residual on torch.float64"):
        bias_residual(x, bias, backend="triton")
    assert bias_residual(x, bias).dtype == torch.float64


def test_inputs_that_require_grad_pass_under_no_grad() -> None:
    with torch.no_grad():
        assert not bias_residual(X.clone().requires_grad_(), B).requires_grad
