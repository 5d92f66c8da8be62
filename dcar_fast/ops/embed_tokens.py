"""The transformer's input from token ids, on the fastest backend there is."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.ops._attention import check_type
from dcar_fast.ops._checks import check_int64, check_no_grad, check_same_device, check_tensor, check_values
from dcar_fast.ops._dispatch import Backend, choose_for, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.reference import embed_tokens as reference
from dcar_fast.reference._moments import PIECE


def embed_tokens(ids: Tensor, table: Tensor, positions: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """x = table[ids] + positions (B, N, D) in the table's type, and its row moments (B, N, ceil(D / 64), 2) float32.

    ids (B, N) int64, table (V, D) of float32, float16, bfloat16 or float64 (which only the reference runs, with float64
    moments), positions (N, D) of the table's type; on one device, with any strides. Summed in float32. The moments are
    those of the rounded x, as ``fused_linear`` reads them. Both contiguous. Formula: ``reference/embed_tokens.py``.

    Inference only. ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit
    together, for ids outside 0..V-1, and for inputs that ask for a gradient. On a GPU looking at the ids would mean
    waiting for it: there the kernel makes NaN of the row of a token outside the table, and PyTorch's indexing asserts.
    """
    check_tensor("ids", ids, ("B", "N"))
    check_int64("ids", ids)
    check_tensor("table", table, ("V", "D"))
    check_type("table", table)
    if 0 in table.shape:
        raise ValueError(f"table has shape {tuple(table.shape)}, allowed is (V, D) with V and D at least 1")
    check_tensor("positions", positions, (ids.shape[1], table.shape[1]))
    if positions.dtype != table.dtype:
        raise ValueError(f"positions is {positions.dtype}, allowed is the type of table, {table.dtype}")
    check_same_device("ids", ids, "table", table)
    check_same_device("ids", ids, "positions", positions)
    check_no_grad("embed_tokens", table=table, positions=positions)
    return _embed_tokens(ids, table, positions, backend)


def _run(ids: Tensor, table: Tensor, positions: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    return choose_for("embed_tokens", table, backend).run(ids, table, positions)


def _fake(ids: Tensor, table: Tensor, positions: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    x = table.new_empty(*ids.shape, table.shape[1])
    return x, moments_like(x)


def moments_like(x: Tensor) -> Tensor:
    """Room for the row moments of x (..., D)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(*x.shape[:-1], -(-x.shape[-1] // PIECE), 2, dtype=wide)


_embed_tokens = define(
    "embed_tokens(Tensor ids, Tensor table, Tensor positions, str? backend) -> (Tensor, Tensor)", _run, _fake
)


def _run_reference(ids: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    check_values("ids", ids, len(table) - 1)
    return reference.embed_tokens(ids, table, positions)


def _run_triton(ids: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    from dcar_fast.kernels.embed_tokens import embed_tokens as kernel  # triton is loaded on use only

    with current(table.device):
        return kernel(ids, table, positions)


register(
    "embed_tokens",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("reference", _run_reference, everywhere),
)
