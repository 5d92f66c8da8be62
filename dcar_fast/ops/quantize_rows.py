"""Rows in float8 with one scale each, for ``fused_linear``, on the fastest backend there is."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.ops._attention import check_type
from dcar_fast.ops._checks import check_moments, check_no_grad, check_number, check_tensor
from dcar_fast.ops._dispatch import Backend, choose_for, current, everywhere, float8_usable, register
from dcar_fast.ops._library import define
from dcar_fast.reference import quantize_rows as reference
from dcar_fast.reference._moments import PIECE

LONGEST = 65_536  # columns: the kernel holds a row in registers


def quantize_rows(
    x: Tensor, *, moments: Tensor | None = None, eps: float = 1e-6, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """x (B, N, K) -> values (B, N, K) float8_e4m3fn and scales (B, N) float32, values * scale = f(x) up to rounding.

    f is the identity, or with ``moments`` (B, N, ceil(K / 64), 2) float32 LayerNorm over K without affine, with ``eps``
    added to the variance; see ``fused_linear``. A row's scale is its largest |f(x)| / 448, so that nothing overflows,
    and at least 2^-126; its values are f(x) / scale, rounded to the nearest, ties to even. A row of zeros has scale 1.
    A row with NaN or an infinity has scale NaN and nothing but NaN. Computed in float32; without moments bit-equal on
    all backends but for the sign of NaN.

    x is float32, float16, bfloat16, or float64, which only the reference runs; with any strides; K at most 65,536. Both
    results are contiguous. The kernel needs a GPU of compute capability 8.9.

    Formula: ``reference/quantize_rows.py``. Inference only. ``backend``: see ``_dispatch.choose``. Raises ValueError,
    before any work, for what does not fit together and for inputs that ask for a gradient.
    """
    check_tensor("x", x, ("B", "N", "K"))
    check_type("x", x)
    if not 1 <= x.shape[2] <= LONGEST:
        raise ValueError(f"x has shape {tuple(x.shape)}, allowed is (B, N, K) with K in 1..{LONGEST}")
    check_number("eps", eps, 0.0)
    if moments is not None:
        check_moments("moments", "x", moments, x, -(-x.shape[2] // PIECE))
    check_no_grad("quantize_rows", x=x)
    return _quantize_rows(x, moments, float(eps), backend)


def _run(x: Tensor, moments: Tensor | None, eps: float, backend: str | None) -> tuple[Tensor, Tensor]:
    return choose_for("quantize_rows", x, backend).run(x, moments, eps)


def _fake(x: Tensor, moments: Tensor | None, eps: float, backend: str | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:2], dtype=torch.float32)


_quantize_rows = define(
    "quantize_rows(Tensor x, Tensor? moments, float eps, str? backend) -> (Tensor, Tensor)", _run, _fake
)


def _run_reference(x: Tensor, moments: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    values, scales = reference.quantize_rows(x, moments=moments, eps=eps)
    return values.contiguous(), scales.contiguous()


def _run_triton(x: Tensor, moments: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    from dcar_fast.kernels.quantize_rows import quantize_rows as kernel  # triton is loaded on use only

    with current(x.device):
        return kernel(x, moments=moments, eps=eps)


register(
    "quantize_rows",
    Backend("triton", _run_triton, float8_usable, launches=1),
    Backend("reference", _run_reference, everywhere),
)
