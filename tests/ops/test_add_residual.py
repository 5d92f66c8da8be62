"""Every implementation of add_residual against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.ops import _native, add_residual
from dcar_fast.reference.add_residual import add_residual as reference
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")
HERE = ["reference", "native", None]
GPU = ["reference", "triton", "cuda", None]
# (B, h, w, V, C): around tiles of 32 channels and of 32 or 64 tokens
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 4),
    (3, 8, 8, 50, 32),
    (1, 16, 16, 300, 32),
    (2, 5, 13, 20, 33),
    (1, 9, 7, 10, 130),
]


def data(batch: int, height: int, width: int, num_codes: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + channels)
    return (
        torch.randint(0, num_codes, (batch, height, width), generator=generator),
        torch.randn(num_codes, channels, generator=generator),
        torch.randn(batch, height * width, channels, generator=generator),
    )


def check(got: Tensor, ids: Tensor, codebook: Tensor, residual: Tensor | None) -> None:
    """``got`` against the sum at every single place, in float64, and in float32 rounded to its type."""

    def spelled_out(dtype: torch.dtype) -> Tensor:
        codes = F.normalize(codebook.to(dtype), dim=1)[ids]  # (B, h, w, C)
        if residual is not None:
            codes = codes + residual.to(dtype).view(codes.shape)
        return codes.permute(0, 3, 1, 2)

    check_close(got, spelled_out(torch.float32).to(got.dtype), spelled_out(torch.float64), str(got.dtype))
    assert got.is_contiguous()


def skip_unless_built(backend: str | None) -> None:
    if backend == "native" and not (usable := _native.cpu_usable(CPU)).ok:
        pytest.skip(usable.reason)
    if backend == "cuda" and not (usable := _native.cuda_usable(torch.device("cuda", 0))).ok:
        pytest.skip(usable.reason)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("discrete", [False, True])
def test_float64_agrees(backend: str | None, dtype: torch.dtype, shape: tuple[int, ...], discrete: bool) -> None:
    skip_unless_built(backend)
    ids, codebook, residual = data(*shape)
    residual = None if discrete else residual
    check(add_residual(ids, codebook, residual, dtype=dtype, backend=backend), ids, codebook, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("discrete", [False, True])
def test_float64_agrees_on_a_gpu(
    backend: str | None, dtype: torch.dtype, shape: tuple[int, ...], discrete: bool
) -> None:
    skip_unless_built(backend)
    ids, codebook, residual = data(*shape)
    residual = None if discrete else residual
    on_gpu = None if residual is None else residual.cuda()
    got = add_residual(ids.cuda(), codebook.cuda(), on_gpu, dtype=dtype, backend=backend)
    check(got.cpu(), ids, codebook, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_turn_foreign_ids_into_nan(backend: str) -> None:
    skip_unless_built(backend)
    ids, codebook, residual = data(2, 6, 6, 9, 40)
    ids[0, 1, 2], ids[1, 5, 5], ids[1, 0, 0] = -1, 9, 2**40
    got = add_residual(ids.cuda(), codebook.cuda(), residual.cuda(), dtype=torch.float32, backend=backend).cpu()
    foreign = ((ids < 0) | (ids >= 9))[:, None].expand_as(got)
    assert got[foreign].isnan().all() and got[~foreign].isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_normalised_codebook_stays_what_it_is(backend: str | None) -> None:
    """decode(codes) of vq_lookup's codes and of the codebook they came from are the same."""
    skip_unless_built(backend)
    ids, codebook, residual = data(2, 4, 4, 30, 32)
    raw = add_residual(ids, codebook * 7, residual, dtype=torch.float32, backend=backend)
    normalised = add_residual(ids, F.normalize(codebook), residual, dtype=torch.float32, backend=backend)
    assert (raw - normalised).abs().max() <= 5e-7


@pytest.mark.parametrize("backend", HERE)
def test_empty(backend: str | None) -> None:
    skip_unless_built(backend)
    for shape in ((0, 3, 4), (2, 0, 4)):
        ids = torch.zeros(shape, dtype=torch.int64)
        residual = torch.zeros(shape[0], shape[1] * shape[2], 5)
        got = add_residual(ids, torch.ones(2, 5), residual, dtype=torch.float16, backend=backend)
        assert (got.shape, got.dtype) == ((shape[0], 5, *shape[1:]), torch.float16)


@pytest.mark.parametrize("backend", HERE)
def test_strides_do_not_matter(backend: str | None) -> None:
    skip_unless_built(backend)
    ids, codebook, residual = data(2, 5, 6, 11, 8)
    want = add_residual(ids, codebook, residual, dtype=torch.float32, backend=backend)
    strided_ids = ids.transpose(1, 2).contiguous().transpose(1, 2)
    strided_residual = residual.transpose(1, 2).contiguous().transpose(1, 2)
    strided_codebook = torch.stack([codebook, codebook + 1], dim=1)[:, 0]
    got = add_residual(strided_ids, strided_codebook, strided_residual, dtype=torch.float32, backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", HERE)
def test_nan_and_infinity_go_through(backend: str | None) -> None:
    skip_unless_built(backend)
    ids, codebook, residual = data(1, 2, 2, 3, 4)
    residual[0, 0, 0], residual[0, 1, 1], residual[0, 2, 2] = float("nan"), float("inf"), -1e6
    codebook[ids[0, 1, 1]] = 0.0  # a zero code stays zero
    for dtype in DTYPES:
        check(add_residual(ids, codebook, residual, dtype=dtype, backend=backend), ids, codebook, residual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_native_rounds_as_pytorch_does(dtype: torch.dtype) -> None:
    """Every binade from subnormal to infinity, and the halfway points between neighbours."""
    skip_unless_built("native")
    patterns = torch.arange(0, 0x7F81, dtype=torch.int16)
    lower = patterns.view(torch.bfloat16).float()
    halfway = (lower.view(torch.int32) + 0x8000).view(torch.float32)
    fine = (torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float().view(torch.int32) + 0x1000).view(
        torch.float32
    )
    values = torch.cat([lower, halfway, fine, torch.tensor([65504.0, 65519.9, 65520.0, 2.0**-25, 2.0**-24 * 1.5])])
    values = torch.cat([values, -values])
    ids = torch.zeros(1, 1, len(values), dtype=torch.int64)
    got = add_residual(ids, torch.zeros(1, 1), values[None, :, None], dtype=dtype, backend="native").flatten()
    assert torch.equal(got.nan_to_num(nan=1.0), values.to(dtype).nan_to_num(nan=1.0))
    assert torch.equal(got.isnan(), values.isnan())


def test_reference_keeps_float64() -> None:
    ids, codebook, residual = data(1, 2, 3, 5, 4)
    got = reference(ids, codebook.double(), residual.double(), dtype=torch.float64)
    want = F.normalize(codebook.double())[ids].permute(0, 3, 1, 2) + residual.double().transpose(1, 2).view(1, 4, 2, 3)
    assert (got - want).abs().max() < 1e-15


IDS, CODEBOOK, RESIDUAL = torch.zeros(2, 3, 4, dtype=torch.int64), torch.ones(5, 6), torch.ones(2, 12, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": IDS.view(2, 12)}, r"ids has shape \(2, 12\), allowed is \(B, h, w\)"),
        ({"ids": IDS.int()}, "ids is torch.int32, allowed is torch.int64"),
        ({"ids": IDS + 5}, r"ids has values in 5..5, allowed are 0..4"),
        ({"ids": IDS - 1}, r"ids has values in -1..-1, allowed are 0..4"),
        ({"codebook": CODEBOOK[0]}, r"codebook has shape \(6,\), allowed is \(V, C\)"),
        ({"codebook": CODEBOOK.long()}, "codebook is torch.int64, allowed are floating-point types"),
        ({"codebook": CODEBOOK[:0]}, r"codebook has shape \(0, 6\)"),
        ({"codebook": CODEBOOK.to("meta")}, "codebook is on meta, allowed is the device of ids, cpu"),
        ({"residual": RESIDUAL[:, :11]}, r"residual has shape \(2, 11, 6\), allowed is \(2, 12, 6\)"),
        ({"residual": RESIDUAL.bool()}, "residual is torch.bool, allowed are floating-point types"),
        ({"residual": RESIDUAL.to("meta")}, "residual is on meta, allowed is the device of ids, cpu"),
        ({"dtype": torch.float64}, "dtype is torch.float64, allowed are torch.float32, torch.float16, torch.bfloat16"),
        ({"residual": RESIDUAL.clone().requires_grad_()}, "residual requires a gradient"),
        ({"codebook": CODEBOOK.clone().requires_grad_()}, "codebook requires a gradient"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"ids": IDS, "codebook": CODEBOOK, "residual": RESIDUAL, "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        add_residual(**{**arguments, **change})


def test_inputs_that_require_grad_pass_under_no_grad() -> None:
    with torch.no_grad():
        got = add_residual(IDS, CODEBOOK.clone().requires_grad_(), RESIDUAL, dtype=torch.float32)
    assert not got.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": 0}, "out is a null pointer"),
        ({"out": 2}, "out is not aligned to 4"),
        ({"ids": 4}, "ids is not aligned"),
        ({"residual": 1}, "residual is not aligned"),
        ({"batch": -1}, "batch is -1"),
        ({"num_codes": 0}, "num_codes is 0"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"batch": 2**40, "tokens": 2**40}, "out has more elements"),
    ],
)
def test_bindings_check_before_they_touch_memory(change: dict, message: str) -> None:
    skip_unless_built("native")
    sizes = {"batch": 1, "tokens": 1, "num_codes": 1, "channels": 1, "num_threads": 1, "dtype": "float32"}
    addresses = {"ids": 8, "codebook": 8, "residual": 0, "out": 8}  # no memory there
    with pytest.raises(ValueError, match=message):
        _native.module().add_residual(**{**addresses, **sizes, **change})


def test_native_does_not_read_beyond_the_codebook() -> None:
    """The kernel looks at the ids itself: it may be called without the op."""
    skip_unless_built("native")
    ids, codebook, out = torch.tensor([0, 3]), torch.ones(3, 2), torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=r"ids: element 1 is 3, allowed are 0..2"):
        _native.module().add_residual(
            ids=ids.data_ptr(),
            codebook=codebook.data_ptr(),
            residual=0,
            out=out.data_ptr(),
            batch=1,
            tokens=2,
            num_codes=3,
            channels=2,
            dtype="float32",
            num_threads=1,
        )
    assert (out == 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens where there is no GPU")
def test_cuda_errors_become_exceptions() -> None:
    if not _native.cpu_usable(CPU).ok or not _native.module().cuda_compiled():
        pytest.skip("no CUDA kernels were built")
    with pytest.raises(RuntimeError, match="add_residual: cudaError"):
        _native.module().add_residual_cuda(
            ids=8,
            codebook=8,
            residual=0,
            out=8,
            batch=1,
            tokens=1,
            num_codes=1,
            channels=1,
            dtype="float32",
            stream=0,
        )
