"""Every implementation of gelu against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar_fast.ops import _native, gelu
from dcar_fast.reference.gelu import gelu as reference
from tests.tolerance import check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CPU = torch.device("cpu")
HERE = ["reference", "native", None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF, NAN = math.inf, math.nan


def skip_unless_built(backend: str | None, dtype: torch.dtype = torch.float32) -> None:
    if backend == "native":
        if not (usable := _native.cpu_usable(CPU)).ok:
            pytest.skip(usable.reason)
        if dtype not in (torch.float32, torch.bfloat16):
            pytest.skip(f"native has no {dtype}")


def normals(*shape: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale).to(dtype)


def by_hand(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def truth(x: Tensor) -> Tensor:
    """In float64 as x / (1 + e^-2z), which does not cancel where tanh is near -1; NaN at -infinity, as 0 x infinity."""
    x = x.double()
    return (x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))).masked_fill(x == -INF, NAN)


def check(got: Tensor, x: Tensor) -> None:
    """The rule for values, and no number on its own far from the truth."""
    assert got.is_contiguous()
    if x.numel() >= 500:  # the largest of a few errors may be small by luck
        check_close(got, F.gelu(x, approximate="tanh"), truth(x))
    error = (got.double() - truth(x)).abs()
    assert got.shape == x.shape and got.dtype == x.dtype
    assert (error <= 4 * torch.finfo(x.dtype).eps * x.double().abs() + torch.finfo(x.dtype).tiny).all()


def test_the_reference_is_the_formula() -> None:
    x = [-40.0, -3.0, -1e-3, 0.0, 0.5, 2.0, 30.0]
    got = gelu(torch.tensor(x, dtype=torch.float64))
    assert torch.allclose(got, torch.tensor([by_hand(v) for v in x], dtype=torch.float64), rtol=1e-14, atol=0)
    few = normals(1000, dtype=torch.float64)
    assert (reference(few) - truth(few)).abs().max() < 1e-15


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_agrees(backend: str | None, dtype: torch.dtype) -> None:
    skip_unless_built(backend, dtype)
    for size in (0, 1, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 1000):  # around the vectors' lengths
        x = normals(size, dtype=dtype)
        check(gelu(x, backend=backend), x)
    for scale in (1e-20, 1e-3, 1.0, 10.0, 1e4):
        x = normals(70, 33, scale=scale, dtype=dtype)
        check(gelu(x, backend=backend), x)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(backend: str | None, dtype: torch.dtype) -> None:
    """Infinities, NaN, zeros, the largest and the smallest numbers, and where the power of two ends."""
    skip_unless_built(backend, dtype)
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    values = [INF, NAN, -INF, largest, -largest, largest / 2, -largest / 2, 0.0, -0.0, tiny, -tiny, 60000.0, -60000.0]
    values += [sign * (4 + i / 16) for i in range(600) for sign in (-1, 1)]
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    got = gelu(x, backend=backend)
    assert got[0] == INF and got[1].isnan() and got[2].isnan() and got[3:].isfinite().all()
    assert got[3:9].tolist() == [largest, 0, largest / 2, 0, 0, 0]
    check(gelu(x[7:], backend=backend), x[7:])


@pytest.mark.parametrize("backend", HERE)
def test_every_bfloat16(backend: str | None) -> None:
    """Never further from float64 than PyTorch's own, plus one rounding, number by number."""
    skip_unless_built(backend)
    x = torch.arange(65536).sub(32768).to(torch.int16).view(torch.bfloat16)
    got, want = gelu(x, backend=backend).double(), truth(x)
    plain = F.gelu(x, approximate="tanh").double()
    assert torch.equal(got.isnan(), plain.isnan())
    ok = plain.isfinite()
    assert torch.equal(got.isinf(), plain.isinf())
    error, baseline = (got - want).abs()[ok], (plain - want).abs()[ok]
    rounding = (want.to(torch.bfloat16).double() - want).abs()[ok]
    assert (error <= 2 * baseline + rounding + 1e-4 * want[ok].abs() + 1e-38).all()
    small = x.abs() < 1e-30  # exactly halved, with ties among the smallest
    assert torch.equal(got[small], (x[small].double() / 2).to(torch.bfloat16).double())


@pytest.mark.parametrize("backend", ["native", None])
def test_relative_accuracy(backend: str | None) -> None:
    """Below 0 too, where 1 + tanh would cancel."""
    skip_unless_built(backend)
    x = torch.linspace(-9, 9, 200_001)
    want = truth(x)
    error = ((gelu(x, backend=backend).double() - want) / want.abs().clamp(min=1e-300)).abs()
    assert error[x > -2].max() < 1e-6 and error.max() < 4e-5


def instruction_sets() -> list[str]:
    return _native.module().cpu_isas() if _native.cpu_usable(CPU).ok else ["none"]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_instruction_set(isa: str, dtype: str) -> None:
    """And nothing is written beyond the last number."""
    skip_unless_built("native")
    for size in (1, 5, 16, 100, 4097):
        x = normals(size, dtype=getattr(torch, dtype))
        out = torch.full((size + 40,), NAN, dtype=x.dtype)
        _native.module().gelu(x=x.data_ptr(), out=out.data_ptr(), count=size, dtype=dtype, num_threads=1, isa=isa)
        check(out[:size], x)
        assert out[size:].isnan().all()


@pytest.mark.parametrize("backend", HERE)
def test_strides_threads_and_size_do_not_matter(backend: str | None) -> None:
    skip_unless_built(backend)
    for dtype in (torch.float32, torch.bfloat16):
        x = normals(700, 301, dtype=dtype)
        want = gelu(x, backend=backend)
        check(want, x)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            check(gelu(x, backend=backend), x)
            if backend != "reference":  # PyTorch computes the ends of a thread's part in another way
                assert torch.equal(gelu(x, backend=backend), want)
        finally:
            torch.set_num_threads(before)
        wide = torch.zeros(1400, 602, dtype=dtype)
        wide[1::2, ::2] = x
        kept = x.clone()
        for other in (x.T.contiguous().T, wide[1::2, ::2]):
            got = gelu(other, backend=backend)
            check(got, x)
        assert torch.equal(x, kept)
        assert gelu(x[3, 5], backend=backend).shape == () and gelu(x[:0], backend=backend).shape == (0, 301)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    x = normals(70, 33, dtype=dtype).cuda()
    check(gelu(x), x)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "x is a list, allowed is a tensor"),
        (torch.zeros(3, dtype=torch.int32), "x is torch.int32, allowed are floating-point types"),
        (torch.zeros(3).to_sparse(), "x is torch.sparse_coo, allowed is torch.strided"),
        (torch.zeros(3, requires_grad=True), "x requires a gradient, which gelu does not have"),
    ],
)
def test_bad_input(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        gelu(value)


def test_backends_by_type() -> None:
    skip_unless_built("native")
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"backend is 'native', which cannot run gelu on {dtype}"):
            gelu(normals(3, dtype=dtype), backend="native")
    with pytest.raises(ValueError, match="backend is 'triton', which cannot run gelu on cpu: gelu has no triton"):
        gelu(normals(3), backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x = normals(4, 3, dtype=dtype).T  # not contiguous
    for backend in ("reference", "native", None):
        if backend != "native" or dtype in (torch.float32, torch.bfloat16):
            torch.library.opcheck(torch.ops.dcar_fast.gelu.default, (x, backend))


def test_compiles_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler needs a torch.empty of its own
    torch.compiler.reset()
    compiled = torch.compile(lambda x: gelu(x) + 1, fullgraph=True)
    for shape in ((3, 8), (3, 9), (5,)):
        x = normals(*shape)
        assert torch.equal(compiled(x), gelu(x) + 1)


def test_exports() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return gelu(x)

    exported = torch.export.export(Model(), (normals(3, 4),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert any(node.target is torch.ops.dcar_fast.gelu.default for node in exported.graph.nodes)
    x = normals(7, 4)
    assert torch.equal(exported.module()(x), gelu(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 0}, "x is a null pointer"),
        ({"out": 0}, "out is a null pointer"),
        ({"x": 2}, "x is not aligned to 4"),
        ({"out": 3, "dtype": "bfloat16"}, "out is not aligned to 2"),
        ({"dtype": "float16"}, "dtype is 'float16', allowed are 'float32' and 'bfloat16'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"count": -1}, "count is -1"),
        ({"count": 2**62}, "x has more elements"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"isa": "mmx"}, "isa is 'mmx'"),
    ],
)
def test_bindings_check_before_they_touch_memory(change: dict, message: str) -> None:
    skip_unless_built("native")
    arguments = {"x": 8, "out": 8, "count": 1, "dtype": "float32", "num_threads": 1}
    with pytest.raises(ValueError, match=message):
        _native.module().gelu(**{**arguments, **change})
