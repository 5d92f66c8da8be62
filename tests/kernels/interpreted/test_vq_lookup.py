"""kernels/vq_lookup.py in Triton's interpreter. Float32 and float16: the interpreter truncates bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.kernels import vq_lookup as kernels
from dcar_fast.reference.vq_lookup import vq_lookup as reference
from tests.tolerance import check_choices, check_close, cosine_bound

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def data(rows: int, num_codes: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, generator=generator), torch.randn(num_codes, channels, generator=generator)


def check(got: tuple[Tensor, Tensor, Tensor], z: Tensor, codebook: Tensor) -> None:
    ids, codes, residual = got
    wide_z, wide_codes = F.normalize(z.double(), dim=1), F.normalize(codebook.double(), dim=1)
    check_choices(ids, wide_z @ wide_codes.T, cosine_bound(z.shape[1]), "ids")
    plain_z, plain_codes = F.normalize(z.float(), dim=1), F.normalize(codebook.float(), dim=1)
    check_close(codes, plain_codes[ids], wide_codes[ids], "codes")
    check_close(residual, plain_z - plain_codes[ids], wide_z - wide_codes[ids], "residual")


# around tiles of 16, 64 and 128 rows, of 64 and 128 codes, and chunks of 16, 32 and 64 channels
SHAPES = [
    (1, 1, 1),
    (16, 129, 2),
    (5, 63, 17),
    (17, 65, 33),
    (65, 700, 32),
    (130, 300, 16),
    (129, 128, 64),
    (40, 200, 65),
    (9, 130, 150),
]


@pytest.mark.parametrize(("rows", "num_codes", "channels"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float64_agrees(rows: int, num_codes: int, channels: int, dtype: torch.dtype) -> None:
    z, codebook = (x.to(dtype) for x in data(rows, num_codes, channels))
    check(kernels.vq_lookup(z, codebook), z, codebook)


def test_types_may_differ() -> None:
    z, codebook = data(20, 90, 8)
    check(kernels.vq_lookup(z.half(), codebook), z.half(), codebook)
    check(kernels.vq_lookup(z, codebook.half()), z, codebook.half())


def test_full_size_ids_equal_float64() -> None:
    """16384 codes of 32 channels, where half-precision products or TF32 get ids wrong."""
    z, codebook = data(512, 16384, 32, seed=1)
    scores = F.normalize(z.double(), dim=1) @ F.normalize(codebook.double(), dim=1).T
    first, second = scores.topk(2, dim=1).values.unbind(1)
    assert (first - second).min() > 4e-7, "the data must be decidable in float32, or this test says nothing"
    assert torch.equal(kernels.vq_lookup(z, codebook)[0], scores.argmax(dim=1))


def close_pairs(pairs: int, channels: int) -> tuple[Tensor, Tensor]:
    """Codes in pairs that differ by about 3e-6, and one row near each pair, nearer to its second code."""
    generator = torch.Generator().manual_seed(3)
    base = F.normalize(torch.randn(pairs, channels, generator=generator), dim=1)
    aside = F.normalize(torch.randn(pairs, channels, generator=generator), dim=1)
    codes = torch.stack([base, base + 3e-6 * aside], dim=1).flatten(0, 1)
    return base + aside, codes


def test_codes_that_differ_in_the_last_bits_are_told_apart() -> None:
    """One product of halves, or the high parts alone, cannot."""
    z, codebook = close_pairs(100, 32)
    scores = F.normalize(z.double(), dim=1) @ F.normalize(codebook.double(), dim=1).T
    decided = scores.topk(2, dim=1).values.diff(dim=1).abs()[:, 0] > 1.5e-6
    assert decided.sum() > 50
    assert torch.equal(kernels.vq_lookup(z, codebook)[0][decided], scores.argmax(dim=1)[decided])


@pytest.mark.parametrize("config", kernels.TABLE.candidates, ids=str)
@pytest.mark.parametrize("channels", [3, 70])
def test_every_configuration_gives_the_same(config: kernels.Config, channels: int) -> None:
    z, codebook = data(70, 300, channels)
    codebook[200:] = codebook[:100]  # ties across tiles and shares
    want = kernels.vq_lookup(z, codebook)
    got = kernels.vq_lookup(z, codebook, config)
    check(got, z, codebook)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("multiprocessors", [1, 3, 1000])
def test_shares_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, multiprocessors: int) -> None:
    """Up to 133, which is more than are finished at a time; the best codes stand in the first and in the last."""
    z, codebook = data(10, 17_000, 8)
    codebook[300:16_700] *= -0.0
    codebook[16_700:] = codebook[:300]
    z[3] = float("nan")
    want = reference(z, codebook)[0]
    assert want.max() < 300
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: multiprocessors)
    assert torch.equal(kernels.vq_lookup(z, codebook)[0], want)


@pytest.mark.parametrize("rows", [1, 16, 256, 4096, 65_537])
@pytest.mark.parametrize("num_codes", [1, 64, 16384, 65_536])
def test_cut_covers_all_codes_in_one_wave_if_it_can(rows: int, num_codes: int) -> None:
    blocks = kernels.TABLE.ship(90, rows=rows, codes=num_codes, channels=32).blocks
    tiles_per_share, shares = kernels.cut(rows, num_codes, blocks, 132)
    code_tiles, row_tiles = -(-num_codes // blocks["BLOCK_CODES"]), -(-rows // blocks["BLOCK_ROWS"])
    assert (shares - 1) * tiles_per_share < code_tiles <= shares * tiles_per_share
    assert shares == 1 or shares * row_tiles <= 2 * 132
    if num_codes >= 16384 and rows <= 4096:
        assert shares * row_tiles >= 128  # one multiprocessor in thirty may idle


@pytest.mark.parametrize("num_codes", [2, 17, 64, 130, 1000])
@pytest.mark.parametrize("channels", [1, 32, 70])
def test_equal_codes_tie_to_the_lowest(num_codes: int, channels: int) -> None:
    z, one = data(7, 1, channels, seed=num_codes)
    assert kernels.vq_lookup(z, one.expand(num_codes, channels))[0].tolist() == [0] * 7


@pytest.mark.parametrize("num_codes", [1, 5, 70])
def test_best_cosine_may_be_negative(num_codes: int) -> None:
    """Padding that scores zero would win here."""
    angle = torch.linspace(0, 1, num_codes)
    codebook = torch.stack([-1 - angle, angle], dim=1)  # cosine with (1, 0) grows from -1 with the index
    ids = kernels.vq_lookup(torch.tensor([[1.0, 0.0]]).expand(9, 2), codebook)[0]
    assert ids.tolist() == [num_codes - 1] * 9


def test_nan_infinity_and_zeros() -> None:
    z, codebook = data(20, 200, 9)
    codebook[::2, 1] = float("nan")
    clean = kernels.vq_lookup(z, codebook)
    assert (clean[0] % 2 == 1).all()
    z[3, 2], z[11, 0], z[7] = float("nan"), float("inf"), 0.0
    ids, codes, residual = kernels.vq_lookup(z, codebook)
    assert ids[[3, 11, 7]].tolist() == [0, 0, 1]  # zeros tie with every code that is a number
    assert residual[3].isnan().all() and residual[11].isnan().all() and residual[7].isfinite().all()
    others = [row for row in range(20) if row not in (3, 7, 11)]
    assert torch.equal(ids[others], clean[0][others]) and torch.equal(residual[others], clean[2][others])
    ids, codes, _ = kernels.vq_lookup(z, torch.full_like(codebook, float("nan")))
    assert ids.tolist() == [0] * 20 and codes.isnan().all()


def test_tiny_and_huge_vectors_keep_their_direction() -> None:
    z, codebook = data(40, 90, 16)
    scale = 10.0 ** torch.linspace(-30, 15, 40)[:, None]
    assert torch.equal(kernels.vq_lookup(z * scale, codebook)[0], kernels.vq_lookup(z, codebook)[0])


def test_strided_and_empty_inputs() -> None:
    z, codebook = data(17, 100, 12)
    want = kernels.vq_lookup(z, codebook)
    wide = torch.full((17, 36), float("nan"))
    wide[:, ::3] = z
    for got, expected in zip(kernels.vq_lookup(wide[:, ::3], codebook.T.contiguous().T), want, strict=True):
        assert torch.equal(got, expected)
    ids, codes, residual = kernels.vq_lookup(torch.zeros(0, 5), torch.ones(3, 5))
    assert (ids.shape, codes.shape, residual.shape) == ((0,), (0, 5), (0, 5)) and ids.dtype == torch.int64


def test_the_default_type_does_not_matter(with_default_dtype) -> None:
    z, codebook = data(40, 300, 20)
    want = kernels.vq_lookup(z, codebook)
    got = with_default_dtype(lambda: kernels.vq_lookup(z, codebook))
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(got, want, strict=True))
