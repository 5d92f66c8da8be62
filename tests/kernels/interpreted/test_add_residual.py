"""kernels/add_residual.py in Triton's interpreter. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.kernels import add_residual as kernels
from dcar_fast.reference.add_residual import add_residual as reference
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def data(batch: int, height: int, width: int, num_codes: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    return (
        torch.randint(0, num_codes, (batch, height, width), generator=generator),
        torch.randn(num_codes, channels, generator=generator),
        torch.randn(batch, height * width, channels, generator=generator),
    )


def check(got: Tensor, ids: Tensor, codebook: Tensor, residual: Tensor | None) -> None:
    plain = reference(ids, codebook, residual, dtype=got.dtype)
    wide = None if residual is None else residual.double()
    check_close(got, plain, reference(ids, codebook.double(), wide, dtype=torch.float64))


# around the tile of 32 tokens, of 32 channels, and of 64 channels walked over more than once
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (2, 3, 5, 7, 4), (2, 8, 8, 40, 32), (1, 3, 11, 9, 33), (2, 5, 7, 6, 64), (1, 2, 3, 5, 150)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("discrete", [False, True])
def test_float64_agrees(shape: tuple[int, ...], dtype: torch.dtype, discrete: bool) -> None:
    ids, codebook, residual = data(*shape)
    residual = None if discrete else residual
    check(kernels.add_residual(ids, codebook, residual, dtype), ids, codebook, residual)


@pytest.mark.parametrize("config", [*kernels.TABLE.candidates, kernels.RULES[-1].config], ids=str)
@pytest.mark.parametrize("channels", [3, 32, 70])
def test_every_configuration_gives_the_same(config, channels: int) -> None:
    ids, codebook, residual = data(2, 5, 9, 13, channels)
    want = kernels.add_residual(ids, codebook, residual, torch.float32)
    got = kernels.add_residual(ids, codebook, residual, torch.float32, config=config)
    check(got, ids, codebook, residual)
    assert (got - want).abs().max() <= 5e-7  # the norm may be summed in another order


@pytest.mark.parametrize("codes_type", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual_type", [torch.float32, torch.float16])
def test_inputs_of_16_bits(codes_type: torch.dtype, residual_type: torch.dtype) -> None:
    ids, codebook, residual = data(2, 5, 9, 13, 40)
    codebook, residual = codebook.to(codes_type), residual.to(residual_type)
    got = kernels.add_residual(ids, codebook, residual, torch.float32)
    assert torch.equal(got, kernels.add_residual(ids, codebook.float(), residual.float(), torch.float32))
    check(got, ids, codebook.float(), residual.float())


def test_foreign_ids_become_nan() -> None:
    ids, codebook, residual = data(2, 6, 6, 9, 40)
    ids[0, 1, 2], ids[1, 5, 5], ids[1, 0, 0] = -1, 9, 2**40
    got = kernels.add_residual(ids, codebook, residual, torch.float32)
    foreign = ((ids < 0) | (ids >= 9))[:, None].expand_as(got)
    assert got[foreign].isnan().all() and got[~foreign].isfinite().all()


def test_zero_codes_stay_zero_and_nan_stays_nan() -> None:
    ids, codebook, residual = torch.arange(4).view(1, 2, 2), torch.ones(4, 5), torch.zeros(1, 4, 5)
    codebook[0], codebook[1, 3], residual[0, 2, 2] = 0.0, float("nan"), float("inf")
    got = kernels.add_residual(ids, codebook, residual, torch.float32)
    check(got, ids, codebook, residual)
    assert (got[0, :, 0, 0] == 0).all() and got[0, :, 0, 1].isnan().all() and got[0, 2, 1, 0] == float("inf")


def test_strided_and_empty_inputs() -> None:
    ids, codebook, residual = data(2, 4, 6, 5, 8)
    want = kernels.add_residual(ids, codebook, residual, torch.float32)
    got = kernels.add_residual(
        ids.transpose(1, 2).contiguous().transpose(1, 2),
        codebook.T.contiguous().T,
        residual.transpose(0, 1).contiguous().transpose(0, 1),
        torch.float32,
    )
    assert torch.equal(got, want)
    channels_first = residual.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(kernels.add_residual(ids, codebook, channels_first, torch.float32), want)
    once = residual[:1, :1].expand(2, 24, 8)
    got = kernels.add_residual(ids, codebook, once, torch.float32)
    assert torch.equal(got, kernels.add_residual(ids, codebook, once.contiguous(), torch.float32))
    assert kernels.add_residual(ids[:0], codebook, residual[:0], torch.float16).shape == (0, 8, 4, 6)


def test_table_picks_the_narrowest_tile() -> None:
    configs = [kernels.TABLE.ship(90, tokens=256, channels=channels) for channels in (1, 32, 33, 64, 65, 1000)]
    assert [config.blocks["BLOCK_CHANNELS"] for config in configs] == [32, 32, 64, 64, 64, 64]
