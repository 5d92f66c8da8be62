"""Confidence-based re-masking, on the fastest backend there is."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from dcar_fast.ops import _native
from dcar_fast.ops._checks import check_int64, check_no_grad, check_same_device, check_tensor, check_values
from dcar_fast.ops._dispatch import Backend, choose, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.reference import remask as reference

DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}


def remask(ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int, *, backend: str | None = None) -> Tensor:
    """ids (B, N) int64 with exactly ``num_masked[b]`` positions of row b replaced by ``mask_id``. Contiguous.

    Positions are ranked by (confidence, index), ascending, NaN below everything, -0 equal to +0; the lowest are
    replaced. confidence (B, N) float16, bfloat16, float32 or float64, none of which is rounded; num_masked (B,) int64
    in 0..N; all on one device, with any strides. ``mask_id``: any int64. Formula: ``reference/remask.py``.

    Inference only. ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit
    together, for num_masked outside 0..N, and for a confidence that asks for a gradient, because there is none. On a
    GPU looking at num_masked would mean waiting for it: there it counts as the nearest of 0..N.
    """
    check_tensor("ids", ids, ("B", "N"))
    check_int64("ids", ids)
    check_tensor("confidence", confidence, ids.shape)
    if confidence.dtype not in DTYPES:
        raise ValueError(f"confidence is {confidence.dtype}, allowed are {', '.join(map(str, DTYPES))}")
    check_tensor("num_masked", num_masked, ids.shape[:1])
    check_int64("num_masked", num_masked)
    check_same_device("ids", ids, "confidence", confidence)
    check_same_device("ids", ids, "num_masked", num_masked)
    if not isinstance(mask_id, int) and isinstance(mask_id, Integral):
        mask_id = int(mask_id)  # NumPy's
    if not isinstance(mask_id, int):
        raise ValueError(f"mask_id is a {type(mask_id).__name__}, allowed is an integer")
    if not -(2**63) <= mask_id < 2**63:
        raise ValueError(f"mask_id is {mask_id}, allowed is what int64 holds")
    check_no_grad("remask", confidence=confidence)
    return _remask(ids, confidence, num_masked, mask_id, backend)


def _run(ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int, backend: str | None) -> Tensor:
    return choose("remask", ids.device, backend).run(ids, confidence, num_masked, mask_id)


def _fake(ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int, backend: str | None) -> Tensor:
    return ids.new_empty(ids.shape)


_remask = define(
    "remask(Tensor ids, Tensor confidence, Tensor num_masked, SymInt mask_id, str? backend) -> Tensor", _run, _fake
)


def _run_reference(ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int) -> Tensor:
    check_values("num_masked", num_masked, ids.shape[1])  # the C++ kernel looks itself
    return reference.remask(ids, confidence, num_masked, mask_id)


def _run_native(ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int) -> Tensor:
    return _call(_native.module().remask, ids, confidence, num_masked, mask_id, num_threads=torch.get_num_threads())


def _run_cuda(ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int) -> Tensor:
    with current(ids.device):
        stream = torch.cuda.current_stream().cuda_stream
        return _call(_native.module().remask_cuda, ids, confidence, num_masked, mask_id, stream=stream)


def _call(kernel, ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int, **how: int) -> Tensor:
    rows, tokens = ids.shape
    out = ids.new_empty(rows, tokens)
    ids, confidence, num_masked = map(_native.aligned, (ids, confidence, num_masked))
    kernel(
        ids=ids.data_ptr(),
        ids_strides=ids.stride(),
        confidence=confidence.data_ptr(),
        confidence_strides=confidence.stride(),
        dtype=DTYPES[confidence.dtype],
        num_masked=num_masked.data_ptr(),
        num_masked_stride=num_masked.stride(0),
        mask_id=mask_id,
        out=out.data_ptr(),
        rows=rows,
        tokens=tokens,
        **how,
    )
    return out


def _run_triton(ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int) -> Tensor:
    from dcar_fast.kernels.remask import remask as kernel  # triton is loaded on use only

    with current(ids.device):
        return kernel(ids, confidence, num_masked, mask_id)


# Triton before its CUDA twin: no measurement on a GPU says that the twin is faster.
register(
    "remask",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("cuda", _run_cuda, _native.cuda_usable, launches=1),
    Backend("native", _run_native, _native.cpu_usable),
    Backend("reference", _run_reference, everywhere),
)
