"""Confidence-based re-masking: the least confident tokens become MASK again."""

from __future__ import annotations

import torch
from torch import Tensor


def remask(ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int) -> Tensor:
    """ids (B, N) with exactly ``num_masked[b]`` positions of row b set to ``mask_id``.

    Positions are ranked by (confidence, index), ascending; NaN ranks below everything. ids (B, N) int64, confidence
    (B, N) float, num_masked (B,) int64 in 0..N on the same device: no host synchronisation, static shapes.
    """
    nan = confidence.isnan()
    by_confidence = confidence.masked_fill(nan, float("-inf")).argsort(dim=-1, stable=True)
    nan_first = nan.gather(-1, by_confidence).logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    order = by_confidence.gather(-1, nan_first)  # (B, N): position of rank r
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(ids.shape[-1], device=ids.device).expand_as(order))
    return ids.masked_fill(ranks < num_masked[:, None], mask_id).contiguous()
