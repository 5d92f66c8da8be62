"""Every implementation of remask: exactly the tokens that sorting in Python chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dcar_fast.ops import _native, remask
from dcar_fast.reference.remask import remask as reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CPU = torch.device("cpu")
HERE = ["reference", "native", None]
GPU = ["reference", "triton", "cuda", None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
MASK = 16384
INF, NAN = math.inf, math.nan


def skip_unless_built(backend: str | None) -> None:
    if backend == "native" and not (usable := _native.cpu_usable(CPU)).ok:
        pytest.skip(usable.reason)
    if backend == "cuda" and not (usable := _native.cuda_usable(torch.device("cuda", 0))).ok:
        pytest.skip(usable.reason)


def spelled_out(ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int) -> Tensor:
    """Python's sort on (is a number, confidence, index)."""
    rows = []
    for row, values, k in zip(ids.tolist(), confidence.tolist(), num_masked.tolist(), strict=True):
        order = sorted(
            range(len(row)), key=lambda i: (values[i] == values[i], 0.0 if values[i] != values[i] else values[i], i)
        )
        chosen = set(order[:k])
        rows.append([mask_id if i in chosen else token for i, token in enumerate(row)])
    return torch.tensor(rows, dtype=torch.int64).view(ids.shape)


def row_of(values: list[float], count: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).repeat(count // len(values) + 1)[:count]


def cases(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """ids, confidence and num_masked; every row with another count. The last sizes pass what a CUDA block keeps."""
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 2, 31, 64, 70, 256, 257, 1000):
        kinds = [
            torch.randn(tokens, generator=generator, dtype=torch.float64),
            torch.rand(tokens, generator=generator, dtype=torch.float64).log(),
            torch.randint(-2, 3, (tokens,), generator=generator).double(),  # ties everywhere
            row_of([1.5], tokens),
            row_of([INF], tokens),
            row_of([-INF], tokens),
            row_of([NAN], tokens),
            row_of([0.0, -0.0], tokens),
            row_of([NAN, -INF, INF, 0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), NAN], tokens),
        ]
        counts = torch.tensor([0, 1, tokens, tokens - 1, tokens // 2, (tokens + 1) // 2, tokens // 3])
        confidence = torch.stack([kind for kind in kinds for _ in counts]).to(dtype)
        ids = torch.randint(0, MASK, confidence.shape, generator=generator)
        yield ids, confidence, counts.repeat(len(kinds))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sorting_agrees(backend: str | None, dtype: torch.dtype) -> None:
    skip_unless_built(backend)
    for ids, confidence, counts in cases(dtype):
        got = remask(ids, confidence, counts, MASK, backend=backend)
        assert torch.equal(got, spelled_out(ids, confidence, counts, MASK)), ids.shape
        assert got.is_contiguous() and torch.equal((got == MASK).sum(1), counts)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sorting_agrees_on_a_gpu(backend: str | None, dtype: torch.dtype) -> None:
    skip_unless_built(backend)
    for ids, confidence, counts in cases(dtype):
        got = remask(ids.cuda(), confidence.cuda(), counts.cuda(), MASK, backend=backend)
        assert torch.equal(got.cpu(), spelled_out(ids, confidence, counts, MASK)), ids.shape


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_rows_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    """Longer than what the CUDA kernel keeps in shared memory, with and without ties."""
    skip_unless_built(backend)
    for values in (torch.randn(2, 10_001, dtype=dtype), torch.randint(0, 5, (2, 10_001)).to(dtype)):
        ids, counts = torch.arange(20_002).view(2, -1), torch.tensor([4321, 9999])
        got = remask(ids.cuda(), values.cuda(), counts.cuda(), -1, backend=backend)
        assert torch.equal(got.cpu(), reference(ids, values, counts, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_take_the_nearest_allowed_count(backend: str) -> None:
    skip_unless_built(backend)
    ids, confidence = torch.arange(40).view(4, 10).cuda(), torch.randn(4, 10).cuda()
    got = remask(ids, confidence, torch.tensor([-1, 11, -(2**63), 2**40]).cuda(), MASK, backend=backend)
    assert (got == MASK).sum(1).tolist() == [0, 10, 0, 10]


@pytest.mark.parametrize("backend", HERE)
def test_float64_is_not_rounded(backend: str | None) -> None:
    """1 - 2^-40 and 1 are one float32."""
    skip_unless_built(backend)
    confidence = torch.tensor([[1.0, 1.0 - 2.0**-40, 1.0 + 2.0**-40]], dtype=torch.float64)
    got = remask(torch.tensor([[5, 6, 7]]), confidence, torch.tensor([1]), -9, backend=backend)
    assert got.tolist() == [[5, -9, 7]]


@pytest.mark.parametrize("backend", HERE)
def test_every_16_bit_number_is_ranked(backend: str | None) -> None:
    """All bit patterns in one row: subnormal numbers, both zeros, infinities, every NaN."""
    skip_unless_built(backend)
    patterns = torch.randperm(65536, generator=torch.Generator().manual_seed(0)).sub(32768).to(torch.int16)
    ids = torch.arange(65536)[None]
    for dtype in (torch.float16, torch.bfloat16):
        confidence, counts = patterns.view(dtype)[None], torch.tensor([30_000])
        got = remask(ids, confidence, counts, -1, backend=backend)
        assert torch.equal(got, spelled_out(ids, confidence, counts, -1))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("mask_id", [-(2**63), -1, 0, 2**63 - 1])
def test_any_mask_id(backend: str | None, mask_id: int) -> None:
    skip_unless_built(backend)
    ids = torch.tensor([[5, -(2**63), 2**63 - 1]])
    got = remask(ids, torch.tensor([[2.0, 3.0, 1.0]]), torch.tensor([2]), mask_id, backend=backend)
    assert got.tolist() == [[mask_id, -(2**63), mask_id]]


@pytest.mark.parametrize("backend", HERE)
def test_empty(backend: str | None) -> None:
    skip_unless_built(backend)
    for rows, tokens in ((0, 5), (3, 0), (0, 0)):
        ids, counts = torch.zeros(rows, tokens, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        got = remask(ids, torch.zeros(rows, tokens), counts, MASK, backend=backend)
        assert (got.shape, got.dtype) == ((rows, tokens), torch.int64)


@pytest.mark.parametrize("backend", HERE)
def test_many_rows(backend: str | None) -> None:
    skip_unless_built(backend)
    rows = 65_537
    ids, confidence = torch.arange(3 * rows).view(rows, 3), torch.rand(rows, 3)
    counts = torch.arange(rows) % 4
    got = remask(ids, confidence, counts, -1, backend=backend)
    lowest = confidence.argmin(1, keepdim=True)
    assert torch.equal((got == -1).sum(1), counts)
    assert torch.equal(got.gather(1, lowest)[:, 0] == -1, counts > 0)
    assert torch.equal(got[got >= 0], ids[got >= 0])


@pytest.mark.parametrize("backend", HERE)
def test_threads_do_not_matter(backend: str | None) -> None:
    skip_unless_built(backend)
    ids, confidence = torch.arange(70 * 2000).view(70, 2000), torch.randn(70, 2000)
    counts = torch.randint(0, 2001, (70,))
    want = remask(ids, confidence, counts, -1, backend=backend)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(remask(ids, confidence, counts, -1, backend=backend), want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", HERE)
def test_strides_do_not_matter(backend: str | None) -> None:
    skip_unless_built(backend)
    ids, confidence, counts = torch.arange(60).view(6, 10), torch.randn(6, 10), torch.arange(6)
    want = remask(ids, confidence, counts, MASK, backend=backend)
    before = ids.clone()
    transposed = remask(ids.T.contiguous().T, confidence.T.contiguous().T, counts, MASK, backend=backend)
    sliced_ids, sliced = torch.zeros(12, 30, dtype=torch.int64), torch.zeros(12, 30)
    sliced_ids[1::2, 2::3], sliced[1::2, 2::3] = ids, confidence
    many_counts = torch.stack([counts, counts + 50], 1)
    sliced_result = remask(sliced_ids[1::2, 2::3], sliced[1::2, 2::3], many_counts[:, 0], MASK, backend=backend)
    for got in (transposed, sliced_result):
        assert torch.equal(got, want) and got.is_contiguous()
    assert torch.equal(ids, before)  # a new tensor is returned
    repeated = remask(ids[:1].expand(6, 10), confidence[:1].expand(6, 10), counts[3].expand(6), MASK, backend=backend)
    assert torch.equal(repeated, remask(ids[:1], confidence[:1], counts[3:4], MASK, backend=backend).expand(6, 10))


IDS, CONFIDENCE, COUNTS = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4), torch.tensor([1, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": IDS.int()}, "ids is torch.int32, allowed is torch.int64"),
        ({"ids": IDS[0]}, r"ids has shape \(4,\), allowed is \(B, N\)"),
        ({"ids": [1]}, r"ids is a list, allowed is a tensor \(B, N\)"),
        ({"confidence": IDS}, "confidence is torch.int64, allowed are torch.float32, torch.float16"),
        ({"confidence": CONFIDENCE.to(torch.float8_e5m2)}, "confidence is torch.float8_e5m2, allowed are"),
        ({"confidence": CONFIDENCE[:, 1:]}, r"confidence has shape \(2, 3\), allowed is \(2, 4\)"),
        ({"confidence": CONFIDENCE.to("meta")}, "confidence is on meta, allowed is the device of ids, cpu"),
        ({"confidence": CONFIDENCE.clone().requires_grad_()}, "confidence requires a gradient"),
        ({"num_masked": COUNTS.int()}, "num_masked is torch.int32, allowed is torch.int64"),
        ({"num_masked": 2}, r"num_masked is a int, allowed is a tensor \(2\)"),
        ({"num_masked": COUNTS.to("meta")}, "num_masked is on meta, allowed is the device of ids, cpu"),
        ({"mask_id": 9.0}, "mask_id is a float, allowed is an integer"),
        ({"mask_id": 2**63}, "mask_id is 9223372036854775808, allowed is what int64 holds"),
        ({"backend": "fastest"}, "backend is 'fastest'"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"ids": IDS, "confidence": CONFIDENCE, "num_masked": COUNTS, "mask_id": 9}
    with pytest.raises(ValueError, match=f"^{message}"):
        remask(**{**arguments, **change})


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("counts", [[1, 5], [-1, 0], [2**40, 0], [0, -(2**63)]])
def test_counts_outside_the_row(backend: str | None, counts: list[int]) -> None:
    skip_unless_built(backend)
    with pytest.raises(ValueError, match=r"^num_masked.*, allowed are 0\.\.4$"):
        remask(IDS, CONFIDENCE, torch.tensor(counts), 9, backend=backend)


def test_confidence_that_requires_grad_passes_under_no_grad() -> None:
    with torch.no_grad():
        got = remask(IDS, CONFIDENCE.clone().requires_grad_(), COUNTS, 9)
    assert (got == 9).sum(1).tolist() == [1, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    ids, confidence = torch.arange(12).view(3, 4), torch.randn(4, 3).to(dtype).T  # (3, 4), not contiguous
    for backend in ("reference", "native"):
        skip_unless_built(backend)
        torch.library.opcheck(
            torch.ops.dcar_fast.remask.default, (ids, confidence, torch.tensor([1, 0, 4]), 7, backend)
        )


def test_compiles_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler needs a torch.empty of its own
    compiled = torch.compile(lambda *inputs: remask(*inputs) + 1, fullgraph=True)
    for tokens, mask_id in ((8, 99), (8, 77), (13, -(2**62))):  # new sizes and ids too
        ids, confidence = torch.arange(3 * tokens).view(3, tokens), torch.randn(3, tokens)
        counts = torch.tensor([0, 3, tokens])
        got = compiled(ids, confidence, counts, mask_id)
        assert torch.equal(got, reference(ids, confidence, counts, mask_id) + 1)


def test_exports() -> None:
    class Model(torch.nn.Module):
        def forward(self, ids: Tensor, confidence: Tensor, counts: Tensor) -> Tensor:
            return remask(ids, confidence, counts, 99)

    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    shapes = ({0: rows, 1: tokens}, {0: rows, 1: tokens}, {0: rows})
    exported = torch.export.export(Model(), (IDS, CONFIDENCE, COUNTS), dynamic_shapes=shapes)
    assert any(node.target is torch.ops.dcar_fast.remask.default for node in exported.graph.nodes)
    ids, confidence, counts = torch.arange(55).view(5, 11), torch.randn(5, 11), torch.tensor([0, 11, 2, 3, 4])
    assert torch.equal(exported.module()(ids, confidence, counts), reference(ids, confidence, counts, 99))


# Addresses with no memory behind them: the bindings must refuse before they look there.
ADDRESSES = {"ids": 8, "confidence": 8, "num_masked": 8, "out": 8}
LAYOUT = {"ids_strides": (1, 1), "confidence_strides": (1, 1), "num_masked_stride": 1, "rows": 1, "tokens": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": 0}, "out is a null pointer"),
        ({"num_masked": 0}, "num_masked is a null pointer"),
        ({"ids": 4}, "ids is not aligned to 8"),
        ({"confidence": 2}, "confidence is not aligned to 4"),
        ({"dtype": "float8"}, "dtype is 'float8', allowed are 'float16', 'bfloat16', 'float32' and 'float64'"),
        ({"rows": -1}, "rows is -1"),
        ({"tokens": -1}, "tokens is -1"),
        ({"ids_strides": (1, -1)}, "ids stride is -1"),
        ({"confidence_strides": (-2, 1)}, "confidence stride is -2"),
        ({"num_masked_stride": -1}, "num_masked stride is -1"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"rows": 2**40, "tokens": 2**40}, "out has more elements"),
    ],
)
def test_bindings_check_before_they_touch_memory(change: dict, message: str) -> None:
    skip_unless_built("native")
    arguments = {**ADDRESSES, **LAYOUT, "dtype": "float32", "mask_id": 0, "num_threads": 1}
    with pytest.raises(ValueError, match=message):
        _native.module().remask(**{**arguments, **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens where there is no GPU")
def test_cuda_errors_become_exceptions() -> None:
    if not _native.cpu_usable(CPU).ok or not _native.module().cuda_compiled():
        pytest.skip("no CUDA kernels were built")
    with pytest.raises(RuntimeError, match="remask: cudaError"):
        _native.module().remask_cuda(**ADDRESSES, **LAYOUT, dtype="float32", mask_id=0, stream=0)
    with pytest.raises(ValueError, match="tokens is 2147483648, allowed is at most"):
        _native.module().remask_cuda(**ADDRESSES, **{**LAYOUT, "tokens": 2**31}, dtype="float32", mask_id=0, stream=0)
