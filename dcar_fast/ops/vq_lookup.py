"""Nearest code of a codebook by cosine, on the fastest backend there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcar_fast.ops import _native
from dcar_fast.ops._checks import check_codebook, check_floating, check_same_device, check_tensor
from dcar_fast.ops._dispatch import Backend, choose, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.reference import vq_lookup as reference

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
EPSILON = 1e-12


def vq_lookup(z: Tensor, codebook: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Looks up the rows of z (M, C) in codebook (V, C); any floating dtype, both on one device, M may be 0.

    Both sides are L2-normalised inside, x / max(|x|, 1e-12), in float32 (formula: ``reference/vq_lookup.py``, which
    takes float64 where an input is float64):

        ids       (M,)    int64: the code with the largest cosine, the lowest index on ties; equal codes tie exactly
        codes     (M, C)  float32: normalise(codebook)[ids]
        residual  (M, C)  float32: normalise(z) - codes

    Squares are summed in float32: a vector beyond 1.8e19 in length becomes zeros, id 0 with a residual of -code.
    A row that holds NaN gets id 0 and a residual of NaN; a code that holds NaN is never chosen unless all do.

    Gradients are straight-through: ``codes`` hands its gradient to z as if it were normalise(z). ``ids`` and
    ``residual`` have none, and none goes to the codebook: train it with a loss on normalise(codebook)[ids].

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together.
    """
    check_tensor("z", z, ("M", "C"))
    check_floating("z", z)
    check_codebook(codebook, z.shape[1])
    check_same_device("z", z, "codebook", codebook)
    return _vq_lookup(z, codebook.detach(), backend)


def _run(z: Tensor, codebook: Tensor, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    return choose("vq_lookup", z.device, backend).run(z, codebook)


def _fake(z: Tensor, codebook: Tensor, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
    ids = z.new_empty(z.shape[0], dtype=torch.int64)
    codes, residual = (z.new_empty(z.shape, dtype=torch.float32) for _ in range(2))
    return ids, codes, residual


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, _, residual = output
    ctx.mark_non_differentiable(ids, residual)
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, _ids: None, grad: Tensor, _residual: None) -> tuple[Tensor, None, None]:
    """The gradient of normalise(z), in float32, or in float64 for z of that type."""
    (z,) = ctx.saved_tensors
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    grad = grad.to(wide.dtype)
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    unit = wide / norm.clamp_min(EPSILON)
    along = unit * (unit * grad).sum(dim=1, keepdim=True)  # what changes the length only
    return ((grad - along * (norm >= EPSILON)) / norm.clamp_min(EPSILON)).to(z.dtype), None, None


_vq_lookup = define(
    "vq_lookup(Tensor z, Tensor codebook, str? backend) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)


def _run_reference(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ids, codes, residual = reference.vq_lookup(z, codebook)
    return ids, codes.float().contiguous(), residual.float().contiguous()


def _readable(x: Tensor) -> Tensor:
    """``x`` as kernels read it: contiguous, of a type that they widen themselves."""
    return (x if x.dtype in DTYPES else x.float()).contiguous()


def _run_native(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z, codebook = _native.aligned(_readable(z)), _native.aligned(_readable(codebook))
    ids = torch.empty(z.shape[0], dtype=torch.int64)
    codes, residual = (torch.empty(z.shape, dtype=torch.float32) for _ in range(2))
    _native.module().vq_lookup(
        z=z.data_ptr(),
        codebook=codebook.data_ptr(),
        ids=ids.data_ptr(),
        codes=codes.data_ptr(),
        residual=residual.data_ptr(),
        rows=z.shape[0],
        num_codes=codebook.shape[0],
        channels=z.shape[1],
        z_dtype=DTYPES[z.dtype],
        codebook_dtype=DTYPES[codebook.dtype],
        num_threads=torch.get_num_threads(),
    )
    return ids, codes, residual


def _run_triton(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from dcar_fast.kernels.vq_lookup import vq_lookup as kernel  # triton is loaded on use only

    with current(z.device):
        return kernel(_readable(z), _readable(codebook))


register(
    "vq_lookup",
    Backend("triton", _run_triton, triton_usable, launches=3),
    Backend("native", _run_native, _native.cpu_usable),
    Backend("reference", _run_reference, everywhere),
)
