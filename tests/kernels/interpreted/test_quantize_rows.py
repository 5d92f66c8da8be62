"""kernels/quantize_rows.py in Triton's interpreter, with PyTorch's conversion to float8: how a GPU rounds is for
tests/ops/test_quantize_rows.py to say. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import quantize_rows as kernels
from dcar_fast.kernels.configs import Config
from dcar_fast.reference._moments import row_moments
from dcar_fast.reference.quantize_rows import quantize_rows as reference
from tests.kernels.float8_interpreter import use_torchs_conversion
from tests.ops.float8_cases import FLOAT8, NUMBERS

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # of NumPy, about the NaN asked for
]


@pytest.fixture(autouse=True)
def torchs_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    use_torchs_conversion(monkeypatch)


TYPES = [torch.float32, torch.float16]


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x: Tensor, config: Config | None = None, **how: object) -> tuple[Tensor, Tensor]:
    """What the reference gives; after LayerNorm, whose sums are in another order, up to their rounding."""
    values, scales = kernels.quantize_rows(x, config=config, **how)
    assert (values.dtype, values.shape, scales.shape) == (FLOAT8, x.shape, x.shape[:2])
    want, want_scales = reference(x, **how)
    values, want = values.float(), want.float()
    if how.get("moments") is None:
        assert torch.equal(scales, want_scales) and torch.equal(values, want)
    else:
        assert ((scales - want_scales).abs() <= 1e-5 * want_scales).all()
        assert (values != want).float().mean() < 1e-3 or x.numel() < 1000
        assert ((values - want).abs() <= (want.abs() / 8).clamp(min=2.0**-9)).all()
    return values, scales


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (3, 5, 64), (1, 9, 65), (2, 6, 600), (1, 2, 9000)])
def test_the_reference_agrees(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (normals(*shape) * 3 + 0.5).to(dtype)
    check(x)
    check(x, moments=row_moments(x))
    check(x, moments=row_moments(x), eps=0.1)


def test_rows_do_not_see_each_other() -> None:
    x = torch.cat((NUMBERS, -NUMBERS)).float()[None, None]
    values, scales = kernels.quantize_rows(torch.cat((x, x * 2.0**-20, x * 2.0**100), dim=1))
    assert scales.tolist() == [[1.0, 2.0**-20, 2.0**100]]
    assert torch.equal(values.float(), x.expand(1, 3, -1))


def test_rows_that_are_not_finite_and_rows_of_zeros() -> None:
    x = normals(1, 8, 70)
    x[0, 0], x[0, 1] = 0, x[0, 1] * 1e-44
    x[0, 2, 3], x[0, 3, 5] = torch.finfo(torch.float32).max, math.nan
    x[0, 4, 69], x[0, 5, 0] = math.inf, -math.inf
    x[0, 6, 1], x[0, 6, 2] = math.nan, math.inf
    values, scales = kernels.quantize_rows(x)
    bad, good = slice(3, 7), [0, 1, 2, 7]
    assert scales[0, bad].isnan().all() and values.float()[0, bad].isnan().all()
    assert scales[0, 0] == 1 and not values.float()[0, 0].any() and scales[0, 1] == 2.0**-126
    check(x[:, good])
    for result in kernels.quantize_rows(x, moments=row_moments(x)):
        assert result.float()[0, bad].isnan().all() and result.float()[0, good].isfinite().all()


def test_float16_infinity_and_its_largest() -> None:
    x = torch.tensor([[[65504.0, -65504.0, 0.0], [math.inf, 1.0, 2.0]]], dtype=torch.float16)
    values, scales = kernels.quantize_rows(x)
    assert values[0, 0].tolist() == [448, -448, 0] and scales[0, 0] == torch.tensor(65504.0) / 448
    assert scales[0, 1].isnan() and values.float()[0, 1].isnan().all()


@pytest.mark.parametrize("config", [*kernels.TABLE.candidates, *(rule.config for rule in kernels.RULES)], ids=str)
def test_every_configuration_gives_the_same(config: Config) -> None:
    x = normals(3, 5, 200)
    want, got = kernels.quantize_rows(x), check(x, config)
    assert torch.equal(got[0], want[0].float()) and torch.equal(got[1], want[1])
    check(x, config, moments=row_moments(x))


def test_strided_and_empty_inputs() -> None:
    x = normals(2, 6, 70)
    want = kernels.quantize_rows(x, moments=row_moments(x))
    room = torch.full((2, 6, 90), math.nan)
    room[..., :70] = x
    wide = torch.stack([row_moments(x)] * 2, dim=-1)[..., 0]
    for odd in (x.permute(2, 1, 0).contiguous().permute(2, 1, 0), room[..., :70]):
        got = kernels.quantize_rows(odd, moments=wide)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, want, strict=True))
    for images, rows in ((0, 3), (2, 0)):
        values, scales = kernels.quantize_rows(torch.ones(images, rows, 40))
        assert values.shape == (images, rows, 40) and scales.shape == (images, rows)
