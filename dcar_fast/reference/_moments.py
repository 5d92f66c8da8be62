"""Row moments: what LayerNorm needs of a row, left by whoever wrote it, in pieces of 64 columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 64


def row_moments(x: Tensor) -> Tensor:
    """(..., ceil(K / 64), 2): mean and sum of squared deviations of each piece of 64 columns of x (..., K), of which
    the last may be narrower. float32, or float64 of float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    width = x.shape[-1]
    pieces = F.pad(x, (0, -width % PIECE)).unflatten(-1, (-1, PIECE))  # (..., P, 64)
    counts = _counts(width, x)
    inside = torch.arange(PIECE, device=x.device) < counts[:, None]  # (P, 64)
    mean = pieces.sum(dim=-1) / counts
    squares = (pieces - mean[..., None]).where(inside, 0.0).square().sum(dim=-1)
    return torch.stack((mean, squares), dim=-1)


def combined(moments: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps), (..., 1) each, of rows of ``width`` columns from their moments (..., P, 2).
    Chan's formula: it does not cancel where the mean is large."""
    means, squares = moments.unbind(dim=-1)
    counts = _counts(width, moments)
    mean = (means * counts).sum(dim=-1, keepdim=True) / width
    squares = (squares + counts * (means - mean).square()).sum(dim=-1, keepdim=True)
    return mean, (squares / width + eps).rsqrt()


def _counts(width: int, like: Tensor) -> Tensor:
    """(P,) columns in each piece."""
    starts = torch.arange(0, width, PIECE, device=like.device)
    return (width - starts).clamp(max=PIECE).to(like.dtype)
