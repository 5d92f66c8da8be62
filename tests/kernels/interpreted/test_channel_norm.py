"""kernels/channel_norm.py in Triton's interpreter. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import channel_norm as kernels
from dcar_fast.reference.channel_norm import channel_norm as reference
from tests.ops.image_cases import LAYOUTS, check_format, lay_out, normals
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check(
    got: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    centred: bool = True,
) -> None:
    settings = {"activation": activation, "eps": eps, "centred": centred}
    plain = reference(x, weight, bias, residual=residual, **settings)
    wide = None if residual is None else residual.double()
    truth = reference(x.double(), weight.double(), bias.double(), residual=wide, **settings)
    check_close(got, plain, truth, f"{activation} {tuple(x.shape)}")


# channels around the tiles of 32, 128, 256, 512 and 1024, and more than a tile holds; pixels around theirs
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (3, 5, 9, 17), (1, 33, 5, 3), (1, 130, 1, 9), (1, 300, 3, 1), (1, 600, 5, 7), (2, 1027, 1, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float64_agrees(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, bias = normals(shape[1], seed=1, dtype=dtype), normals(shape[1], seed=2, dtype=dtype)
    for layout in ("contiguous", "channels_last"):
        for activation, with_residual, centred in (
            ("none", True, True),
            ("relu", False, True),
            ("silu", True, True),
            ("none", True, False),
        ):
            x = lay_out((3 * normals(*shape) + 1).to(dtype), layout)
            residual = lay_out(normals(*shape, seed=3, dtype=dtype), layout) if with_residual else None
            got = kernels.channel_norm(x, weight, bias, residual, activation, 1e-5, centred)
            check(got, x, weight, bias, residual, activation, centred=centred)
            check_format(got, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["contiguous", "channels_last", "cutout"])
def test_strides_do_not_matter(layout: str, other: str) -> None:
    x, residual = normals(2, 37, 4, 5), normals(2, 37, 4, 5, seed=3)
    weight, bias = normals(37, 2, seed=1)[:, 0], normals(74, seed=2)[::2]
    got = kernels.channel_norm(lay_out(x, layout), weight, bias, lay_out(residual, other), "relu", 0.1)
    check(got, x, weight, bias, residual, "relu", 0.1)
    check_format(got, layout)


@pytest.mark.parametrize("config", kernels.TABLE.candidates, ids=str)
@pytest.mark.parametrize("channels", [70, 1100])
def test_every_configuration_gives_the_same(config, channels: int) -> None:
    x, weight, bias = normals(2, channels, 3, 7), normals(channels, seed=1), normals(channels, seed=2)
    for layout in ("contiguous", "channels_last"):
        check(
            kernels.channel_norm(lay_out(x, layout), weight, bias, x, "silu", 1e-5, True, config),
            x,
            weight,
            bias,
            x,
            "silu",
        )


@pytest.mark.parametrize("channels", [6, 1030])
def test_nan_and_infinity_stay_in_their_pixel(channels: int) -> None:
    x, weight, bias = normals(1, channels, 3, 4), normals(channels, seed=1), normals(channels, seed=2)
    x[0, 1, 0, 0], x[0, 2, 1, 1], x[0, 3, 2, 2] = float("nan"), float("inf"), -float("inf")
    for activation in ("none", "relu", "silu"):
        got = kernels.channel_norm(x, weight, bias, None, activation, 1e-5)
        check(got, x, weight, bias, None, activation)
        assert got.isnan().sum() == 3 * channels


def test_mean_far_from_zero_and_the_end_of_float16() -> None:
    for channels in (64, 1100):
        x, ones, zeros = normals(1, channels, 3, 3) + 1e4, torch.ones(channels), torch.zeros(channels)
        check(kernels.channel_norm(x, ones, zeros, None, "none", 1e-5), x, ones, zeros)
        x = (60000 * normals(1, channels, 1, 3).sign()).half()
        check(kernels.channel_norm(x, ones.half(), zeros.half(), None, "none", 1e-5), x, ones.half(), zeros.half())


def test_empty() -> None:
    got = kernels.channel_norm(torch.zeros(0, 4, 3, 2).half(), torch.ones(4), torch.ones(4), None, "none", 1e-5)
    assert (got.shape, got.dtype) == ((0, 4, 3, 2), torch.float16)
