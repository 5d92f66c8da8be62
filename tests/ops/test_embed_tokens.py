"""Every implementation of embed_tokens against float64; bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.ops import embed_tokens
from dcar_fast.ops._dispatch import launches
from tests.ops.moment_cases import check_moments
from tests.ops.sampling_cases import normals

pytestmark = pytest.mark.usefixtures("poisoned_empty")

LOW = [torch.float32, torch.float16, torch.bfloat16]
HERE = ["reference", None]
GPU = ["reference", "triton", None]
# B, N, V, D: around pieces of 64 columns
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (3, 4, 9, 64), (1, 9, 5, 65), (2, 6, 4, 300)]


def data(images: int, tokens: int, entries: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, entries, (images, tokens), generator=torch.Generator().manual_seed(width))
    return ids, (normals(entries, width) + 5).to(dtype), normals(tokens, width, seed=1, dtype=dtype)


def check(ids: Tensor, table: Tensor, positions: Tensor, backend: str | None) -> None:
    """The sum is exact up to its one rounding; the moments are those of the rounded sum."""
    x, moments = embed_tokens(ids, table, positions, backend=backend)
    want = torch.stack([table[row].double() + positions.double() for row in ids]).float()  # is exact for 16 bits
    assert torch.equal(x, want.to(table.dtype)) and x.is_contiguous()
    check_moments(moments.cpu(), x.cpu())


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees(shape: tuple[int, ...], dtype: torch.dtype, backend: str | None) -> None:
    check(*data(*shape, dtype), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [*SHAPES, (16, 256, 16385, 1152)])
def test_float64_agrees_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, backend: str | None) -> None:
    check(*(x.cuda() for x in data(*shape, dtype)), backend)


@pytest.mark.gpu
def test_kernels_turn_foreign_ids_into_nan() -> None:
    ids, table, positions = data(2, 6, 9, 70, torch.float32)
    ids[0, 1], ids[1, 5], ids[1, 0] = -1, 9, 2**40
    x, moments = embed_tokens(ids.cuda(), table.cuda(), positions.cuda(), backend="triton")
    foreign = ((ids < 0) | (ids >= 9)).cuda()
    assert x[foreign].isnan().all() and x[~foreign].isfinite().all()
    assert moments[foreign].isnan().all() and moments[~foreign].isfinite().all()


def test_float64_stays_float64() -> None:
    ids, table, positions = data(2, 6, 9, 70, torch.float64)
    x, moments = embed_tokens(ids, table, positions)
    assert torch.equal(x, table[ids] + positions)
    assert moments.dtype == torch.float64 and torch.equal(moments[:, :, 0, 0], x[..., :64].sum(dim=2) / 64)


def test_strides_and_empty() -> None:
    ids, table, positions = data(2, 6, 9, 70, torch.float32)
    want = embed_tokens(ids, table, positions)
    got = embed_tokens(ids.T.contiguous().T, table.T.contiguous().T, positions.T.contiguous().T)
    assert all(map(torch.equal, got, want))
    for images, tokens in ((0, 6), (2, 0)):
        x, moments = embed_tokens(torch.ones(images, tokens, dtype=torch.int64), table, positions[:tokens])
        assert x.shape == (images, tokens, 70) and moments.shape == (images, tokens, 2, 2)


def test_many_rows() -> None:
    ids, table, positions = data(65_537, 1, 9, 3, torch.float32)
    check(ids, table, positions, None)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.dcar_fast.embed_tokens.default, (*data(2, 6, 9, 70, torch.float32), None))


def test_compiles_as_one_graph_and_exports() -> None:
    class Embed(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            x, moments = embed_tokens(*inputs)
            return x * moments[:, :, 0, :1]

    inputs = data(2, 6, 9, 70, torch.float32)
    want = Embed()(*inputs)
    compiled = torch.compile(Embed(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Embed(), inputs)
    for call in (compiled, exported.module()):
        assert torch.equal(call(*inputs), want)
    assert torch.ops.dcar_fast.embed_tokens.default in [node.target for node in exported.graph.nodes]


def test_launches_are_declared() -> None:
    assert launches("embed_tokens") == 1


IDS, TABLE, POSITIONS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(7, 5), torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": IDS[0]}, r"ids has shape \(3,\), allowed is \(B, N\)"),
        ({"ids": IDS.int()}, "ids is torch.int32, allowed is torch.int64"),
        ({"ids": IDS + 7}, r"ids has values in 7\.\.7, allowed are 0\.\.6"),
        ({"ids": IDS - 1}, r"ids has values in -1\.\.-1, allowed are 0\.\.6"),
        ({"table": TABLE.long()}, "table is torch.int64, allowed are torch.float32"),
        ({"table": TABLE[:0]}, r"table has shape \(0, 5\), allowed is \(V, D\) with V and D at least 1"),
        ({"table": TABLE.to("meta")}, "table is on meta, allowed is the device of ids, cpu"),
        ({"positions": POSITIONS[:2]}, r"positions has shape \(2, 5\), allowed is \(3, 5\)"),
        ({"positions": POSITIONS.half()}, "positions is torch.float16, allowed is the type of table, torch.float32"),
        ({"table": TABLE.clone().requires_grad_()}, "table requires a gradient, which embed_tokens does not have"),
        ({"backend": "cuda"}, "backend is 'cuda', which cannot run embed_tokens"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments = {"ids": IDS, "table": TABLE, "positions": POSITIONS, **change}
    with pytest.raises(ValueError, match=message):
        embed_tokens(**arguments)
