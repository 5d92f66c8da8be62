"""Every implementation of upsample_shortcut against the sum spelled out: bit-equal, it is one addition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.models.autoencoder import Upsample
from dcar_fast.ops import upsample_shortcut
from dcar_fast.reference.upsample_shortcut import upsample_shortcut as reference
from tests.ops.image_cases import DTYPES, LAYOUTS, check_format, lay_out, normals

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HERE = ["reference", None]
GPU = ["reference", "triton", None]
# (B, channels of y, channels of x, H, W): each channel of x repeated 1, 2, 3, 4, 6, 8 and 12 times
SHAPES = [
    (1, 4, 4, 1, 1),
    (2, 12, 6, 3, 5),
    (1, 12, 4, 4, 1),
    (2, 40, 10, 2, 7),
    (1, 24, 4, 3, 3),
    (1, 8, 1, 5, 2),
    (1, 12, 1, 1, 6),
]


def spelled_out(y: Tensor, x: Tensor) -> Tensor:
    batch, inner, height, width = y.shape
    repeats = inner // x.shape[1]
    out = y.new_full((batch, inner // 4, 2 * height, 2 * width), float("nan"))
    for channel in range(inner):
        c, i, j = channel // 4, channel // 2 % 2, channel % 2
        out[:, c, i::2, j::2] = y[:, channel] + x[:, channel // repeats]
    return out


def compare(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    batch, inner, inputs, height, width = shape
    y = normals(batch, inner, height, width, dtype=dtype).to(device)
    x = normals(batch, inputs, height, width, seed=1, dtype=dtype).to(device)
    want = spelled_out(y, x)
    for layout in LAYOUTS:
        for other in {layout, "channels_last", "contiguous"}:
            got = upsample_shortcut(lay_out(y, layout), lay_out(x, other), backend=backend)
            assert torch.equal(got, want) and got.dtype == dtype, (layout, other)
            check_format(got, layout)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(backend, dtype, shape, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (65537, 4, 2, 1, 1), (2, 2048, 512, 16, 16), (1, 1024, 512, 3, 129)])
def test_is_the_formula_on_a_gpu(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(backend, dtype, shape, "cuda")


def unusual(backend: str | None, device: str) -> None:
    y, x = (
        torch.full((1, 8, 2, 3), 60000.0, device=device).half(),
        torch.full((1, 2, 2, 3), 10000.0, device=device).half(),
    )
    y[0, 3, 0, 0], x[0, 1, 1, 1], y[0, 5, 1, 1] = float("nan"), -float("inf"), float("inf")
    for layout in ("contiguous", "channels_last"):
        got = upsample_shortcut(lay_out(y, layout), lay_out(x, layout), backend=backend)
        assert torch.equal(got.nan_to_num(nan=1.0), spelled_out(y, x).nan_to_num(nan=1.0))
        assert got.isnan().sum() == 2 and got.isneginf().sum() == 3 and got.isposinf().sum() == 48 - 5


@pytest.mark.parametrize("backend", HERE)
def test_infinity_nan_and_the_end_of_float16(backend: str | None) -> None:
    unusual(backend, "cpu")


@pytest.mark.gpu
def test_infinity_nan_and_the_end_of_float16_on_a_gpu() -> None:
    unusual("triton", "cuda")


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 4), (8, 16)])
def test_model_agrees(inputs: int, outputs: int) -> None:
    layer, x = Upsample(inputs, outputs), normals(2, inputs, 3, 4)
    with torch.no_grad():
        assert torch.equal(layer(x), reference(layer.conv(x), x))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("shape", [(0, 8, 3, 2), (2, 8, 0, 2)])
def test_empty(backend: str | None, shape: tuple[int, ...]) -> None:
    got = upsample_shortcut(torch.zeros(shape).half(), torch.zeros(shape).half(), backend=backend)
    assert (got.shape, got.dtype) == ((shape[0], 2, 2 * shape[2], 2 * shape[3]), torch.float16)


def test_torch_sees_one_operation() -> None:
    y, x = normals(2, 8, 3, 5), normals(2, 4, 3, 5, seed=1)
    for layout in ("contiguous", "channels_last", "channels_last slice", "cutout"):
        arguments = (lay_out(y, layout), lay_out(x, layout), None)
        torch.library.opcheck(torch.ops.dcar_fast.upsample_shortcut.default, arguments)


def test_compile_and_export() -> None:
    class Up(torch.nn.Module):
        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return upsample_shortcut(y, x) * 2

    arguments = (lay_out(normals(2, 8, 3, 5), "channels_last"), normals(2, 4, 3, 5, seed=1))
    want = Up()(*arguments)
    assert torch.equal(torch.compile(Up(), fullgraph=True, backend="aot_eager")(*arguments), want)
    exported = torch.export.export(Up(), arguments)
    assert torch.equal(exported.module()(*arguments), want)
    assert any("dcar_fast.upsample_shortcut" in str(node.target) for node in exported.graph.nodes)


Y, X = torch.ones(2, 8, 3, 5), torch.ones(2, 4, 3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": Y[0]}, r"y has shape \(8, 3, 5\), allowed is \(B, 4C', H, W\)"),
        ({"y": Y[:, :6]}, "y has 6 channels, allowed are positive multiples of 4"),
        ({"y": Y[:, :0]}, "y has 0 channels, allowed are positive multiples of 4"),
        ({"y": Y.int()}, "y is torch.int32, allowed are torch.float32"),
        ({"x": X[:, :3]}, "x has 3 channels, allowed are divisors of the 8 channels of y"),
        ({"x": X[:, :0]}, "x has 0 channels, allowed are divisors"),
        ({"x": torch.ones(2, 16, 3, 5)}, "x has 16 channels, allowed are divisors"),
        ({"x": X[..., :4]}, r"x has shape \(2, 4, 3, 4\), allowed is \(2, Cin, 3, 5\)"),
        ({"x": X.half()}, "x is torch.float16, allowed is the type of y, torch.float32"),
        ({"x": X.to("meta")}, "x is on meta, allowed is the device of y, cpu"),
        ({"x": None}, "x is a NoneType, allowed is a tensor"),
        ({"x": X.clone().requires_grad_()}, "x requires a gradient, which upsample_shortcut does not have"),
        ({"y": Y.clone().requires_grad_()}, "y requires a gradient"),
        ({"backend": "triton"}, "backend is 'triton', which cannot run upsample_shortcut on cpu"),
        ({"backend": "cuda"}, "upsample_shortcut has no cuda implementation"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upsample_shortcut(**{"y": Y, "x": X, **change})


@pytest.mark.gpu
def test_kernels_refuse_float64() -> None:
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run upsample_shortcut on torch.float64"):
        upsample_shortcut(Y.double().cuda(), X.double().cuda(), backend="triton")


def test_inputs_that_require_grad_pass_under_no_grad() -> None:
    with torch.no_grad():
        assert not upsample_shortcut(Y.clone().requires_grad_(), X).requires_grad
