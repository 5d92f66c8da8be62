"""kernels/depthwise_gate.py in Triton's interpreter. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import depthwise_gate as kernels
from dcar_fast.reference.depthwise_gate import depthwise_gate as reference
from tests.ops.image_cases import LAYOUTS, check_format, lay_out, normals, uniforms
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    channels = shape[1]
    weight = uniforms(-0.2, 0.8, channels, 1, 3, 3, seed=1, dtype=dtype)
    return uniforms(-1, 3, *shape, dtype=dtype), weight, normals(channels, seed=2, dtype=dtype)


def check(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> None:
    plain = reference(x, weight, bias, activation=activation)
    check_close(got, plain, reference(x.double(), weight.double(), bias.double(), activation=activation))


# (B, 2C, H, W): around tiles of 16, 32, 64 and 256 channels, of 8, 16 and 32 steps, of 4 rows and of 16 to 64 columns
@pytest.mark.parametrize("shape", [(9, 2, 1, 1), (2, 6, 5, 3), (1, 520, 3, 2), (1, 70, 18, 2), (1, 34, 2, 66)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float64_agrees(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = data(shape, dtype)
    for layout in ("contiguous", "channels_last"):
        got = kernels.depthwise_gate(lay_out(x, layout), weight, bias, "silu")
        check(got, x, weight, bias, "silu")
        check_format(got, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    x, weight, bias = data((2, 10, 3, 4))
    by_tap = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    got = kernels.depthwise_gate(lay_out(x, layout), by_tap, bias.repeat_interleave(2)[::2], "relu")
    check(got, x, weight, bias, "relu")
    check_format(got, layout)


@pytest.mark.parametrize("config", kernels.TABLE.candidates, ids=str)
def test_every_configuration_gives_the_same(config) -> None:
    """Each serves either memory format, whichever it was made for."""
    x, weight, bias = data((1, 38, 5, 3))
    for layout in ("contiguous", "channels_last"):
        check(kernels.depthwise_gate(lay_out(x, layout), weight, bias, "silu", config), x, weight, bias, "silu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_nan_infinity_and_the_end_of_float16(layout: str, activation: str) -> None:
    for dtype in (torch.float32, torch.float16):
        x, weight, bias = data((1, 4, 5, 6), dtype)
        x[0, 0, 1, 1], x[0, 1, 3, 3], x[0, 2, 4, 5], x[0, 3, 0, 5] = float("nan"), float("inf"), -float("inf"), 1e4
        got = kernels.depthwise_gate(lay_out(x, layout), weight, bias, activation)
        check(got, x, weight, bias, activation)
        assert got.isnan().any() and got[0, 1, 0, :4].isfinite().all()


def test_empty() -> None:
    assert kernels.depthwise_gate(torch.zeros(2, 4, 3, 0), torch.ones(4, 1, 3, 3), torch.ones(4), "silu").shape == (
        2,
        2,
        3,
        0,
    )
