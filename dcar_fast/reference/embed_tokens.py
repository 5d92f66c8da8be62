"""The transformer's input: token embeddings plus positions, with the row moments that the first LayerNorm needs."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.reference._moments import row_moments


def embed_tokens(ids: Tensor, table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """table[ids] + positions (B, N, D) in the table's type, and its row moments (B, N, ceil(D / 64), 2), for ids (B, N)
    int64, table (V, D), positions (N, D). Summed in float32, or in float64 if given float64."""
    wide = torch.promote_types(table.dtype, torch.float32)
    x = (table[ids].to(wide) + positions.to(wide)).to(table.dtype)
    return x, row_moments(x)
