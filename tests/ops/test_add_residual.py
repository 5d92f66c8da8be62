"""Every implementation of add_residual against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.ops import _native, add_residual
from dcar_fast.ops._dispatch import choose
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


def check_inputs_of_any_type(backend: str | None, device: str) -> None:
    """Codebook and residual of 16 bits give exactly what their float32 copies give; but for Triton, which sums the norm
    in an order that depends on how it loads the type."""
    for shape in SHAPES[1:]:
        ids, codebook, residual = (value.to(device) for value in data(*shape))
        for codes_type in (*DTYPES, torch.float64):
            for residual_type in (*DTYPES, torch.float64):
                codes, added = codebook.to(codes_type), residual.to(residual_type)
                got = add_residual(ids, codes, added, dtype=torch.float32, backend=backend)
                want = add_residual(ids, codes.float(), added.float(), dtype=torch.float32, backend=backend)
                chosen = choose("add_residual", torch.device(device), backend).name
                assert chosen == "triton" or torch.equal(got, want)
                check(got.cpu(), ids.cpu(), codes.float().cpu(), added.float().cpu())


@pytest.mark.parametrize("backend", HERE)
def test_inputs_of_any_type(backend: str | None) -> None:
    skip_unless_built(backend)
    check_inputs_of_any_type(backend, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
def test_inputs_of_any_type_on_a_gpu(backend: str | None) -> None:
    skip_unless_built(backend)
    check_inputs_of_any_type(backend, "cuda")


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_residual(backend: str | None, dtype: torch.dtype) -> None:
    skip_unless_built(backend)
    residual = torch.arange(65536).sub(32768).to(torch.int16).view(dtype)
    ids = torch.zeros(1, 256, 256, dtype=torch.int64)
    got = add_residual(ids, torch.zeros(1, 1), residual[None, :, None], dtype=torch.float32, backend=backend)
    assert torch.equal(got.flatten().isnan(), residual.isnan())
    assert torch.equal(got.flatten().nan_to_num(nan=1.0), residual.float().nan_to_num(nan=1.0))


@pytest.mark.parametrize("backend", HERE)
def test_many_rows_and_the_last_id(backend: str | None) -> None:
    skip_unless_built(backend)
    ids, codebook = torch.full((65_537, 1, 1), 6), torch.eye(7, 2) + 1
    residual = torch.arange(65_537.0)[:, None, None].expand(-1, 1, 2)
    got = add_residual(ids, codebook, residual, dtype=torch.float32, backend=backend)
    check(got, ids, codebook, residual)


@pytest.mark.parametrize("backend", HERE)
def test_threads_do_not_matter(backend: str | None) -> None:
    skip_unless_built(backend)
    ids, codebook, residual = data(3, 40, 31, 100, 64)
    want = add_residual(ids, codebook, residual, dtype=torch.bfloat16, backend=backend)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(add_residual(ids, codebook, residual, dtype=torch.bfloat16, backend=backend), want)
    finally:
        torch.set_num_threads(before)


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
    once = residual[:1, :1].expand(2, 30, 8)
    got = add_residual(ids, codebook, once, dtype=torch.float32, backend=backend)
    assert torch.equal(got, add_residual(ids, codebook, once.contiguous(), dtype=torch.float32, backend=backend))


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


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("ids", [IDS + 5, IDS - 1, IDS - 2**40])
def test_ids_outside_the_codebook(backend: str | None, ids: Tensor) -> None:
    skip_unless_built(backend)
    with pytest.raises(ValueError, match=r"^ids.*, allowed are 0\.\.4$"):
        add_residual(ids, CODEBOOK, RESIDUAL, dtype=torch.float32, backend=backend)


def test_inputs_that_require_grad_pass_under_no_grad() -> None:
    with torch.no_grad():
        got = add_residual(IDS, CODEBOOK.clone().requires_grad_(), RESIDUAL, dtype=torch.float32)
    assert not got.requires_grad


@pytest.mark.parametrize("discrete", [False, True])
def test_opcheck(discrete: bool) -> None:
    ids, codebook, residual = data(2, 3, 5, 7, 4)
    strided = None if discrete else residual.transpose(1, 2).contiguous().transpose(1, 2)
    for backend in ("reference", "native"):
        skip_unless_built(backend)
        for dtype in DTYPES:
            arguments = (ids.transpose(1, 2), codebook.bfloat16(), strided, dtype, backend)
            torch.library.opcheck(torch.ops.dcar_fast.add_residual.default, arguments)


def test_compiles_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler needs a torch.empty of its own
    compiled = torch.compile(lambda *inputs: add_residual(*inputs, dtype=torch.float16) * 2, fullgraph=True)
    for shape in ((2, 3, 5, 7, 4), (3, 4, 6, 9, 4)):  # new sizes too
        inputs = data(*shape)
        assert torch.equal(compiled(*inputs), add_residual(*inputs, dtype=torch.float16) * 2)


def test_exports() -> None:
    class Model(torch.nn.Module):
        def forward(self, ids: Tensor, codebook: Tensor, residual: Tensor) -> Tensor:
            return add_residual(ids, codebook, residual, dtype=torch.bfloat16)

    batch = torch.export.Dim("batch")
    inputs = data(2, 3, 5, 7, 4)
    exported = torch.export.export(Model(), inputs, dynamic_shapes=({0: batch}, None, {0: batch}))
    assert any(node.target is torch.ops.dcar_fast.add_residual.default for node in exported.graph.nodes)
    inputs = data(5, 3, 5, 7, 4)
    check(exported.module()(*inputs), *inputs)


# Addresses with no memory behind them: the bindings must refuse before they look there.
ADDRESSES = {"ids": 8, "codebook": 8, "residual": 0, "out": 8}
TYPES = {"codebook_dtype": "float32", "residual_dtype": "float32", "dtype": "float32"}
LAYOUT = {"residual_strides": (1, 1, 1), "batch": 1, "tokens": 1, "num_codes": 1, "channels": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": 0}, "out is a null pointer"),
        ({"out": 2}, "out is not aligned to 4"),
        ({"ids": 4}, "ids is not aligned"),
        ({"residual": 2}, "residual is not aligned to 4"),
        ({"residual": 1, "residual_dtype": "float16"}, "residual is not aligned to 2"),
        ({"codebook": 2}, "codebook is not aligned to 4"),
        ({"codebook_dtype": "float64"}, "codebook_dtype is 'float64', allowed are 'float16', 'bfloat16', 'float32'"),
        ({"residual_strides": (1, -1, 1)}, "residual stride is -1"),
        ({"batch": -1}, "batch is -1"),
        ({"num_codes": 0}, "num_codes is 0"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"batch": 2**40, "tokens": 2**40}, "out has more elements"),
    ],
)
def test_bindings_check_before_they_touch_memory(change: dict, message: str) -> None:
    skip_unless_built("native")
    with pytest.raises(ValueError, match=message):
        _native.module().add_residual(**{**ADDRESSES, **TYPES, **LAYOUT, "num_threads": 1, **change})


def test_native_does_not_read_beyond_the_codebook() -> None:
    """The kernel looks at the ids itself: it may be called without the op."""
    skip_unless_built("native")
    ids, codebook, out = torch.tensor([0, 3]), torch.ones(3, 2), torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=r"ids: element 1 is 3, allowed are 0..2"):
        arrays = {"ids": ids.data_ptr(), "codebook": codebook.data_ptr(), "residual": 0, "out": out.data_ptr()}
        sizes = {"batch": 1, "tokens": 2, "num_codes": 3, "channels": 2}
        _native.module().add_residual(**arrays, **TYPES, **{**LAYOUT, **sizes}, num_threads=1)
    assert (out == 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens where there is no GPU")
def test_cuda_errors_become_exceptions() -> None:
    if not _native.cpu_usable(CPU).ok or not _native.module().cuda_compiled():
        pytest.skip("no CUDA kernels were built")
    with pytest.raises(RuntimeError, match="add_residual: cudaError"):
        _native.module().add_residual_cuda(**ADDRESSES, **TYPES, **LAYOUT, stream=0)
