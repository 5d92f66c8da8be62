"""Decoder input from token ids, on the fastest backend there is."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.ops import _native
from dcar_fast.ops._checks import (
    check_codebook,
    check_floating,
    check_int64,
    check_no_grad,
    check_same_device,
    check_tensor,
    check_values,
)
from dcar_fast.ops._dispatch import Backend, choose, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.reference import add_residual as reference

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def add_residual(
    ids: Tensor, codebook: Tensor, residual: Tensor | None, *, dtype: torch.dtype, backend: str | None = None
) -> Tensor:
    """Latents (B, C, h, w) from ids (B, h, w) int64, codebook (V, C) and residual (B, h*w, C) or None, on one device.

    out[b, :, y, x] = normalise(codebook[ids[b, y, x]]) + residual[b, y*w + x], with normalise as in ``vq_lookup`` (a
    codebook that is normalised already stays what it is), summed in float32 and rounded once to ``dtype``: float32,
    float16 or bfloat16. Contiguous. codebook and residual are each of any floating type, float64 is rounded to float32;
    what is not contiguous is copied, except the residual. Formula: ``reference/add_residual.py``.

    Inference only. ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit
    together, for ids outside 0..V-1, and for inputs that ask for a gradient, because there is none. On a GPU looking at
    the ids would mean waiting for it: there the kernels turn a token outside the codebook into NaN, and PyTorch's
    indexing asserts.
    """
    check_tensor("ids", ids, ("B", "h", "w"))
    check_int64("ids", ids)
    check_codebook(codebook)
    check_same_device("ids", ids, "codebook", codebook)
    batch, height, width = ids.shape
    if residual is not None:
        check_tensor("residual", residual, (batch, height * width, codebook.shape[1]))
        check_floating("residual", residual)
        check_same_device("ids", ids, "residual", residual)
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, allowed are {', '.join(map(str, DTYPES))}")
    check_no_grad("add_residual", codebook=codebook, residual=residual)
    return _add_residual(ids, codebook, residual, dtype, backend)


def _run(ids: Tensor, codebook: Tensor, residual: Tensor | None, dtype: torch.dtype, backend: str | None) -> Tensor:
    run = choose("add_residual", ids.device, backend).run
    return run(ids, _narrow(codebook), None if residual is None else _narrow(residual), dtype)


def _narrow(values: Tensor) -> Tensor:
    """Of a type that the kernels read."""
    return values if values.dtype in DTYPES else values.float()


def _fake(ids: Tensor, codebook: Tensor, residual: Tensor | None, dtype: torch.dtype, backend: str | None) -> Tensor:
    batch, height, width = ids.shape
    return codebook.new_empty(batch, codebook.shape[1], height, width, dtype=dtype)


_add_residual = define(
    "add_residual(Tensor ids, Tensor codebook, Tensor? residual, ScalarType dtype, str? backend) -> Tensor", _run, _fake
)


def _run_reference(ids: Tensor, codebook: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    check_values("ids", ids, len(codebook) - 1)  # the C++ kernel looks itself
    return reference.add_residual(ids, codebook, residual, dtype=dtype)


def _run_native(ids: Tensor, codebook: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _call(_native.module().add_residual, ids, codebook, residual, dtype, num_threads=torch.get_num_threads())


def _run_cuda(ids: Tensor, codebook: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    with current(ids.device):
        stream = torch.cuda.current_stream().cuda_stream
        return _call(_native.module().add_residual_cuda, ids, codebook, residual, dtype, stream=stream)


def _call(kernel, ids: Tensor, codebook: Tensor, residual: Tensor | None, dtype: torch.dtype, **how: int) -> Tensor:
    batch, height, width = ids.shape
    ids, codebook = _native.aligned(ids.contiguous()), _native.aligned(codebook.contiguous())
    residual = None if residual is None else _native.aligned(residual)
    out = torch.empty(batch, codebook.shape[1], height, width, dtype=dtype, device=ids.device)
    kernel(
        ids=ids.data_ptr(),
        codebook=codebook.data_ptr(),
        codebook_dtype=DTYPES[codebook.dtype],
        residual=0 if residual is None else residual.data_ptr(),
        residual_dtype="float32" if residual is None else DTYPES[residual.dtype],
        residual_strides=(0, 0, 0) if residual is None else residual.stride(),
        out=out.data_ptr(),
        dtype=DTYPES[dtype],
        batch=batch,
        tokens=height * width,
        num_codes=codebook.shape[0],
        channels=codebook.shape[1],
        **how,
    )
    return out


def _run_triton(ids: Tensor, codebook: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    from dcar_fast.kernels.add_residual import add_residual as kernel  # triton is loaded on use only

    with current(ids.device):
        return kernel(ids, codebook, residual, dtype)


# Triton before its CUDA twin: no measurement on a GPU says that the twin is faster.
register(
    "add_residual",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("cuda", _run_cuda, _native.cuda_usable, launches=1),
    Backend("native", _run_native, _native.cpu_usable),
    Backend("reference", _run_reference, everywhere),
)
