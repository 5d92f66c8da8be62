"""kernels/upsample_shortcut.py in Triton's interpreter. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import pytest
import torch

from dcar_fast.kernels import upsample_shortcut as kernels
from dcar_fast.kernels._layout import pixels
from dcar_fast.reference.upsample_shortcut import upsample_shortcut as reference
from tests.ops.image_cases import LAYOUTS, check_format, lay_out, normals

pytestmark = pytest.mark.usefixtures("poisoned_empty")


# (B, channels of y, channels of x, H, W): each channel of x repeated 1, 2, 3, 4, 6, 8 and 12 times; around the tiles of
# 64 and 128 channels and of 8, 16, 256 and 512 pixels
@pytest.mark.parametrize(
    "shape",
    [
        (1, 4, 4, 1, 1),
        (2, 12, 6, 3, 5),
        (1, 12, 4, 4, 1),
        (2, 280, 70, 3, 3),
        (1, 24, 4, 15, 17),
        (1, 520, 65, 2, 9),
        (1, 12, 1, 16, 33),
        (1, 4, 2, 16, 16),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, inner, inputs, height, width = shape
    y = normals(batch, inner, height, width, dtype=dtype)
    x = normals(batch, inputs, height, width, seed=1, dtype=dtype)
    for layout in ("contiguous", "channels_last"):
        got = kernels.upsample_shortcut(lay_out(y, layout), lay_out(x, layout))
        assert torch.equal(got, reference(y, x)) and got.dtype == dtype
        check_format(got, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_strides_do_not_matter(layout: str, other: str) -> None:
    y, x = normals(2, 24, 4, 5), normals(2, 12, 4, 5, seed=1)
    got = kernels.upsample_shortcut(lay_out(y, layout), lay_out(x, other))
    assert torch.equal(got, reference(y, x))
    check_format(got, layout)


def test_only_uneven_rows_are_copied_and_keep_their_memory_format() -> None:
    image = normals(2, 4, 5, 6)
    for layout in ("contiguous", "channels_last", "channel slice", "channels_last slice", "every other"):
        x = lay_out(image, layout)
        assert pixels(x).data_ptr() == x.data_ptr() and torch.equal(pixels(x), image.flatten(2))
    for x in (lay_out(image, "cutout"), lay_out(image, "channels_last")[:, :, 1:, 1:]):
        assert pixels(x).data_ptr() != x.data_ptr() and torch.equal(pixels(x), x.flatten(2))
    assert pixels(lay_out(image, "channels_last")[:, :, 1:, 1:]).stride(1) == 1


@pytest.mark.parametrize(
    ("layout", "config"),
    [("channels_last", config) for config in kernels.LAST_TABLE.candidates]
    + [("contiguous", config) for config in kernels.CONTIGUOUS_TABLE.candidates],
    ids=str,
)
def test_every_configuration_gives_the_same(layout: str, config) -> None:
    y, x = normals(2, 264, 5, 13), normals(2, 66, 5, 13, seed=1)
    got = kernels.upsample_shortcut(lay_out(y, layout), lay_out(x, layout), config)
    assert torch.equal(got, reference(y, x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinity_nan_and_the_end_of_float16(layout: str) -> None:
    y, x = torch.full((1, 8, 2, 3), 60000.0).half(), torch.full((1, 2, 2, 3), 10000.0).half()
    y[0, 3, 0, 0], x[0, 1, 1, 1], y[0, 5, 1, 1] = float("nan"), -float("inf"), float("inf")
    got = kernels.upsample_shortcut(lay_out(y, layout), lay_out(x, layout))
    assert torch.equal(got.nan_to_num(nan=1.0), reference(y, x).nan_to_num(nan=1.0))
    assert torch.equal(got.isnan(), reference(y, x).isnan()) and got.isnan().sum() == 2


def test_empty() -> None:
    got = kernels.upsample_shortcut(torch.zeros(2, 8, 0, 3), torch.zeros(2, 2, 0, 3))
    assert got.shape == (2, 2, 0, 6)
