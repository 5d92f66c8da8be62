"""kernels/relu_linear_attention.py in Triton's interpreter. Float32 and float16: the interpreter computes bfloat16
wrongly, and takes every product in full precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import relu_linear_attention as kernels
from dcar_fast.reference.relu_linear_attention import relu_linear_attention as reference
from tests.ops.image_cases import LAYOUTS, check_format, lay_out, normals
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def data(batch: int, heads: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normals(batch, 96 * heads, height, width, seed=height * width).to(dtype)


# on either side of 32 pixels, of the tiles of 16, 32 and 64, and of 512 and 4096 pixels, where the sums are split
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (2, 2, 3, 5),
        (1, 3, 4, 8),
        (1, 1, 3, 11),
        (2, 2, 8, 8),
        (1, 1, 5, 13),
        (1, 2, 25, 41),
        (1, 1, 65, 66),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float64_agrees(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    qkv = data(*shape, dtype)
    for layout in ("contiguous", "channels_last"):
        got = kernels.relu_linear_attention(lay_out(qkv, layout))
        check_close(got, reference(qkv), reference(qkv.double()), layout)
        check_format(got, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [3, 9])
def test_strides_do_not_matter(layout: str, width: int) -> None:
    qkv = data(2, 2, 5, width)
    got = kernels.relu_linear_attention(lay_out(qkv, layout))
    check_close(got, reference(qkv), reference(qkv.double()))
    check_format(got, layout)


@pytest.mark.parametrize("config", kernels.STATE.candidates, ids=str)
def test_every_state_configuration_gives_the_same(config) -> None:
    qkv = data(1, 1, 25, 29)
    check_close(kernels.relu_linear_attention(qkv, state_config=config), reference(qkv), reference(qkv.double()))


def test_a_tile_does_not_reach_into_the_next_split() -> None:
    qkv = data(1, 1, 65, 66)  # 4290 pixels in splits of 576
    got = kernels.relu_linear_attention(qkv, state_config=kernels.tile(128, 4))
    check_close(got, reference(qkv), reference(qkv.double()))


@pytest.mark.parametrize("config", kernels.APPLY.candidates, ids=str)
def test_every_configuration_gives_the_same(config) -> None:
    qkv = data(2, 2, 5, 15)
    check_close(kernels.relu_linear_attention(qkv, config=config), reference(qkv), reference(qkv.double()))


@pytest.mark.parametrize("config", kernels.SMALL.candidates, ids=str)
def test_every_small_configuration_gives_the_same(config) -> None:
    qkv = data(2, 2, 5, 5)
    check_close(kernels.relu_linear_attention(qkv, config=config), reference(qkv), reference(qkv.double()))


@pytest.mark.parametrize(("height", "width"), [(4, 8), (5, 9)])
def test_overflow_nan_infinity_and_silence(height: int, width: int) -> None:
    loud = (60 * data(1, 1, height, width)).half()  # the sums leave float16's range
    check_close(kernels.relu_linear_attention(loud), reference(loud), reference(loud.double()))
    for channel in (3, 40, 70):  # of q, of k, of v
        for value in (float("nan"), float("inf"), -float("inf")):
            qkv = data(2, 2, height, width)
            qkv[1, 96 + channel, 1, 2] = value
            got = kernels.relu_linear_attention(qkv)
            check_close(got, reference(qkv), reference(qkv.double()), f"{value} in channel {channel}")
            assert got[0].isfinite().all() and got[1, :32].isfinite().all()
    silent = -data(1, 2, height, width).abs() - 0.1
    assert (kernels.relu_linear_attention(silent) == 0).all()


def test_result_does_not_depend_on_the_batch() -> None:
    qkv = data(3, 2, 23, 25)
    want = kernels.relu_linear_attention(qkv)
    assert torch.equal(kernels.relu_linear_attention(qkv[1:2]), want[1:2])


def test_empty() -> None:
    for shape in ((0, 96, 8, 8), (2, 96, 0, 8)):
        assert kernels.relu_linear_attention(torch.zeros(shape)).shape == (shape[0], 32, *shape[2:])
