"""Rows in float8 (e4m3) with one scale each."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.reference._moments import combined

LARGEST = 448.0  # that e4m3 holds
SMALLEST = 2.0**-126  # scale, the smallest float32 of full precision


def quantize_rows(x: Tensor, *, moments: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x (B, N, K) -> values (B, N, K) float8_e4m3fn and scales (B, N) float32 with values * scale = f(x) up to
    rounding; see ``ops/quantize_rows.py``. Nothing is beyond 448 by more than a rounding of float32, which does not
    overflow. Computed in float32, or in float64 if given float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    f = x.to(wide)
    if moments is not None:
        mean, rstd = combined(moments.to(wide), x.shape[-1], eps)
        f = (f - mean) * rstd
    largest = f.abs().amax(dim=-1)  # (B, N), NaN where a row has one
    scale = (largest / LARGEST).clamp(min=SMALLEST).float()
    scale = scale.masked_fill(largest == 0, 1.0).masked_fill(~largest.isfinite(), float("nan"))
    return (f / scale[..., None].to(wide)).to(torch.float8_e4m3fn), scale
