"""Decoder input from token ids: normalised codes + residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_residual(ids: Tensor, codebook: Tensor, residual: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """Latents (B, C, h, w) of type ``dtype`` from ids (B, h, w) int64, codebook (V, C) and residual (B, h*w, C).

    normalise(codebook)[ids] + residual, with normalise over C as ``torch.nn.functional.normalize`` (a codebook that is
    normalised already stays what it is). ``residual=None`` leaves the discrete path. Summed in float32, or in float64
    if an input is float64, and rounded to ``dtype`` once. Contiguous.
    """
    batch, height, width = ids.shape
    wide = codebook.dtype == torch.float64 or (residual is not None and residual.dtype == torch.float64)
    rows = F.normalize(
        codebook[ids.reshape(batch, height * width)].to(torch.float64 if wide else torch.float32), dim=-1
    )
    if residual is not None:
        rows = rows + residual  # (B, h*w, C)
    return rows.to(dtype).transpose(1, 2).contiguous().view(batch, codebook.shape[1], height, width)
