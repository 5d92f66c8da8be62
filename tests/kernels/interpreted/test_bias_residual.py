"""kernels/bias_residual.py in Triton's interpreter. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import bias_residual as kernels
from dcar_fast.kernels.configs import Config
from dcar_fast.reference.bias_residual import bias_residual as reference
from tests.ops.image_cases import LAYOUTS, check_format, lay_out, normals
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check(got: Tensor, x: Tensor, bias: Tensor, residual: Tensor | None = None, activation: str = "none") -> None:
    """The sums are bit-equal, silu is as near to float64 as PyTorch is."""
    plain = reference(x, bias, residual=residual, activation=activation)
    if activation != "silu":
        torch.testing.assert_close(got, plain, rtol=0, atol=0, equal_nan=True, check_stride=False)
        return
    wide = None if residual is None else residual.double()
    truth = reference(x.double(), bias.double(), residual=wide, activation=activation)
    check_close(got, plain, truth, f"{activation} {tuple(x.shape)}")


# channels around the tiles of 2, 8, 32, 64, 128 and 256; pixels around those of 8, 16, 32, 64, 256 and 1024
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (3, 5, 9, 17), (1, 33, 5, 13), (2, 130, 1, 17), (1, 258, 3, 3), (2, 600, 5, 7), (1, 3, 33, 65)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    bias = normals(shape[1], seed=1, dtype=dtype)
    for layout in ("contiguous", "channels_last"):
        for activation, with_residual in (("none", True), ("none", False), ("relu", False), ("silu", True)):
            x = lay_out(normals(*shape, dtype=dtype), layout)
            residual = lay_out(normals(*shape, seed=3, dtype=dtype), layout) if with_residual else None
            got = kernels.bias_residual(x, bias, residual, activation)
            check(got, x, bias, residual, activation)
            check_format(got, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_strides_do_not_matter(layout: str, other: str) -> None:
    x, residual, bias = normals(2, 37, 4, 5), normals(2, 37, 4, 5, seed=3), normals(74, seed=2)[::2]
    got = kernels.bias_residual(lay_out(x, layout), bias, lay_out(residual, other), "relu")
    check(got, x, bias, residual, "relu")
    check_format(got, layout)


@pytest.mark.parametrize("config", kernels.TABLE.candidates, ids=str)
def test_every_configuration_gives_the_same(config: Config) -> None:
    x, residual, bias = normals(2, 530, 3, 7), normals(2, 530, 3, 7, seed=1), normals(530, seed=2)
    for layout in ("contiguous", "channels_last"):
        got = kernels.bias_residual(lay_out(x, layout), bias, lay_out(residual, layout), "none", config)
        check(got, x, bias, residual)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinity_nan_and_the_end_of_float16(layout: str) -> None:
    x, residual = torch.full((1, 4, 2, 3), 60000.0).half(), torch.full((1, 4, 2, 3), -51200.0).half()
    bias = torch.tensor([10000.0, -60000.0, 0.0, float("nan")]).half()
    x[0, 0, 0, 0], x[0, 1, 1, 1], x[0, 2, 0, 1] = float("nan"), -float("inf"), float("inf")
    residual[0, 2, 0, 1] = -float("inf")
    got = kernels.bias_residual(lay_out(x, layout), bias, lay_out(residual, layout), "none")
    check(got, x, bias, residual)
    assert got[0, 0, 1, 1] == 18800 and got.isnan().sum() == 1 + 1 + 6
    for activation in ("relu", "silu"):
        got = kernels.bias_residual(lay_out(x, layout), bias, None, activation)
        assert torch.equal(got.isnan(), reference(x, bias, activation=activation).isnan())
    check(kernels.bias_residual(lay_out(x, layout), bias, None, "relu"), x, bias, None, "relu")


def test_empty() -> None:
    for shape in ((0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 3, 0)):
        got = kernels.bias_residual(torch.zeros(shape).half(), torch.ones(shape[1]), None, "none")
        assert (got.shape, got.dtype) == (shape, torch.float16)
