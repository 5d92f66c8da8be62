"""The end of an unmasking step in one call, on the fastest backend there is."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from dcar_fast.noise import ConfidenceNoise
from dcar_fast.ops import _native
from dcar_fast.ops._checks import (
    check_floating,
    check_int64,
    check_no_grad,
    check_number,
    check_same_device,
    check_tensor,
    check_values,
)
from dcar_fast.ops._dispatch import Backend, choose, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.ops._sampling import LARGEST_WORD
from dcar_fast.reference import place_tokens as reference


def place_tokens(
    ids: Tensor,
    rows: Tensor | None,
    sampled: Tensor,
    confidence: Tensor,
    num_masked: Tensor,
    mask_id: int,
    *,
    tau: float,
    noise: Tensor | ConfidenceNoise | None,
    next_open: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """New ids (B, N) int64 and the positions (B, next_open) int64 to look at next; both contiguous.

    ids (B, N) int64 hold mask_id where a position is open. rows (B, n) int64: the positions that were sampled, distinct
    in each row; None: all of them, n = N. sampled (B, n) int64 and confidence (B, n) float32 belong to them. Open
    positions get their sampled id, or stay open if there is none.

    Then the num_masked (B,) int64 in 0..N positions that are lowest by (confidence + tau * gumbel, index) become
    mask_id; what was not open or not sampled comes last, NaN first. noise: uniforms (B, N) in [0, 1], or a
    ConfidenceNoise of B seeds; None: the last step, which masks nothing and does not look at num_masked. Positions to
    look at next: those of mask_id, ascending, then the others, ascending. Formula: ``reference/place_tokens.py``.

    Inference only. ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit
    together, for rows outside 0..N-1, num_masked outside 0..N, and seeds below 0. On a GPU looking at them would mean
    waiting for it: there num_masked counts as the nearest of 0..N, and rows must be right.
    """
    check_tensor("ids", ids, ("B", "N"))
    check_int64("ids", ids)
    if rows is not None:
        check_tensor("rows", rows, (ids.shape[0], "n"))
        check_int64("rows", rows)
        check_same_device("ids", ids, "rows", rows)
    shape = ids.shape if rows is None else rows.shape
    check_tensor("sampled", sampled, shape)
    check_int64("sampled", sampled)
    check_tensor("confidence", confidence, shape)
    if confidence.dtype != torch.float32:
        raise ValueError(f"confidence is {confidence.dtype}, allowed is torch.float32")
    check_tensor("num_masked", num_masked, ids.shape[:1])
    check_int64("num_masked", num_masked)
    for name, value in (("sampled", sampled), ("confidence", confidence), ("num_masked", num_masked)):
        check_same_device("ids", ids, name, value)
    mask_id = _checked_mask_id(mask_id)
    check_number("tau", tau, 0.0)
    if isinstance(next_open, bool) or not isinstance(next_open, int) or not 0 <= next_open <= ids.shape[1]:
        raise ValueError(f"next_open is {next_open!r}, allowed is an integer in 0..{ids.shape[1]}")
    uniforms, seeds, step = _checked_noise(noise, ids)
    check_no_grad("place_tokens", confidence=confidence, noise=uniforms)
    return _place_tokens(
        ids, rows, sampled, confidence, num_masked, mask_id, float(tau), uniforms, seeds, step, next_open, backend
    )


def _checked_mask_id(mask_id: int) -> int:
    if not isinstance(mask_id, int) and isinstance(mask_id, Integral):
        mask_id = int(mask_id)  # NumPy's
    if not isinstance(mask_id, int):
        raise ValueError(f"mask_id is a {type(mask_id).__name__}, allowed is an integer")
    if not -(2**63) <= mask_id < 2**63:
        raise ValueError(f"mask_id is {mask_id}, allowed is what int64 holds")
    return mask_id


def _checked_noise(noise: Tensor | ConfidenceNoise | None, ids: Tensor) -> tuple[Tensor | None, Tensor | None, int]:
    """(uniforms, seeds, step): the first, the two others, or neither."""
    if noise is None:
        return None, None, 0
    if not isinstance(noise, ConfidenceNoise):
        check_tensor("noise", noise, ids.shape)
        check_floating("noise", noise)
        check_same_device("ids", ids, "noise", noise)
        return noise, None, 0
    check_tensor("noise.seeds", noise.seeds, ids.shape[:1])
    check_int64("noise.seeds", noise.seeds)
    check_same_device("ids", ids, "noise.seeds", noise.seeds)
    if isinstance(noise.step, bool) or not isinstance(noise.step, int) or not 0 <= noise.step <= LARGEST_WORD:
        raise ValueError(f"noise.step is {noise.step!r}, allowed are 0..{LARGEST_WORD}")
    return None, noise.seeds, noise.step


def _run(
    ids: Tensor,
    rows: Tensor | None,
    sampled: Tensor,
    confidence: Tensor,
    num_masked: Tensor,
    mask_id: int,
    tau: float,
    uniforms: Tensor | None,
    seeds: Tensor | None,
    step: int,
    next_open: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    noise: Tensor | ConfidenceNoise | None = None if uniforms is None else uniforms.float()
    if seeds is not None:
        noise = ConfidenceNoise(seeds, step)
    run = choose("place_tokens", ids.device, backend).run
    return run(ids, rows, sampled, confidence, num_masked, mask_id, tau=tau, noise=noise, next_open=next_open)


def _fake(
    ids: Tensor,
    rows: Tensor | None,
    sampled: Tensor,
    confidence: Tensor,
    num_masked: Tensor,
    mask_id: int,
    tau: float,
    uniforms: Tensor | None,
    seeds: Tensor | None,
    step: int,
    next_open: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.shape), ids.new_empty(ids.shape[0], next_open)


_place_tokens = define(
    "place_tokens(Tensor ids, Tensor? rows, Tensor sampled, Tensor confidence, Tensor num_masked, SymInt mask_id, "
    "float tau, Tensor? uniforms, Tensor? seeds, SymInt step, SymInt next_open, str? backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)


def _run_reference(
    ids: Tensor,
    rows: Tensor | None,
    sampled: Tensor,
    confidence: Tensor,
    num_masked: Tensor,
    mask_id: int,
    *,
    tau: float,
    noise: Tensor | ConfidenceNoise | None,
    next_open: int,
) -> tuple[Tensor, Tensor]:
    if rows is not None:
        check_values("rows", rows, ids.shape[1] - 1)
    if noise is not None:
        check_values("num_masked", num_masked, ids.shape[1])
    if isinstance(noise, ConfidenceNoise):
        check_values("noise.seeds", noise.seeds, 2**63 - 1)
    return reference.place_tokens(
        ids, rows, sampled, confidence, num_masked, mask_id, tau=tau, noise=noise, next_open=next_open
    )


def _run_native(
    ids: Tensor,
    rows: Tensor | None,
    sampled: Tensor,
    confidence: Tensor,
    num_masked: Tensor,
    mask_id: int,
    *,
    tau: float,
    noise: Tensor | ConfidenceNoise | None,
    next_open: int,
) -> tuple[Tensor, Tensor]:
    counted = isinstance(noise, ConfidenceNoise)
    uniforms = None if counted else noise
    seeds = _native.aligned(noise.seeds.contiguous()) if counted else None
    ids, rows, sampled, confidence, uniforms = map(_rowwise, (ids, rows, sampled, confidence, uniforms))
    num_masked = _native.aligned(num_masked.contiguous())
    new_ids, next_rows = ids.new_empty(ids.shape), ids.new_empty(ids.shape[0], next_open)
    _native.module().place_tokens(
        **_layout("ids", ids),
        **_layout("rows", rows),
        **_layout("chosen", sampled),
        **_layout("confidence", confidence),
        **_layout("uniforms", uniforms),
        seeds=0 if seeds is None else seeds.data_ptr(),
        step=noise.step if counted else 0,
        num_masked=num_masked.data_ptr(),
        mask_id=mask_id,
        tau=tau,
        new_ids=new_ids.data_ptr(),
        next_rows=next_rows.data_ptr(),
        batch=ids.shape[0],
        tokens=ids.shape[1],
        sampled=sampled.shape[1],
        next_open=next_open,
        noise="none" if noise is None else "counter" if counted else "uniforms",
        num_threads=torch.get_num_threads(),
    )
    return new_ids, next_rows


def _run_triton(
    ids: Tensor,
    rows: Tensor | None,
    sampled: Tensor,
    confidence: Tensor,
    num_masked: Tensor,
    mask_id: int,
    *,
    tau: float,
    noise: Tensor | ConfidenceNoise | None,
    next_open: int,
) -> tuple[Tensor, Tensor]:
    from dcar_fast.kernels.place_tokens import place_tokens as kernel  # triton is loaded on use only

    seeds, step = (noise.seeds, noise.step) if isinstance(noise, ConfidenceNoise) else (None, 0)
    uniforms = noise if seeds is None else None
    drawn = {"uniforms": uniforms, "seeds": seeds, "step": step}
    with current(ids.device):
        return kernel(ids, rows, sampled, confidence, num_masked, mask_id, tau=tau, **drawn, next_open=next_open)


def _rowwise(x: Tensor | None) -> Tensor | None:
    """Copied unless the elements of a row lie side by side."""
    return x if x is None else _native.aligned(x if x.stride(1) == 1 else x.contiguous())


def _layout(name: str, x: Tensor | None) -> dict[str, int]:
    return {name: 0 if x is None else x.data_ptr(), f"{name}_stride": 0 if x is None else x.stride(0)}


register(
    "place_tokens",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("native", _run_native, _native.cpu_usable),
    Backend("reference", _run_reference, everywhere),
)
