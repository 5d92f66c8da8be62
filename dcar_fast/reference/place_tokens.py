"""The end of an unmasking step: sampled ids into the open positions, the least confident masked again."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.noise import ConfidenceNoise
from dcar_fast.reference.remask import remask
from dcar_fast.reference.sample_from_logits import gumbel

LARGEST = torch.finfo(torch.float32).max


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
) -> tuple[Tensor, Tensor]:
    """New ids (B, N) int64 and the positions (B, next_open) int64 to look at next.

    ids (B, N) hold mask_id where a position is open. rows (B, n): the positions that were sampled, distinct in each
    row, None for all in order (n = N); sampled (B, n) int64 and confidence (B, n) floating point belong to them. Open
    positions get their sampled id; one that was not sampled stays open.

    Then the num_masked (B,) least confident become mask_id, as :func:`dcar_fast.reference.remask.remask` ranks them by
    confidence + tau * gumbel(noise), at most float32's largest number, +inf at positions that were not open or not
    sampled. noise: uniforms (B, N) or a ConfidenceNoise; None is the last step, which masks nothing.

    Positions to look at next: those of mask_id in the new ids, ascending, then the others, ascending.
    """
    is_open = ids == mask_id  # (B, N)
    if rows is None:
        placed, values, was_sampled = sampled, confidence, is_open
    else:
        placed = ids.scatter(1, rows, sampled)
        values = confidence.new_zeros(ids.shape).scatter(1, rows, confidence)
        was_sampled = is_open & torch.zeros_like(is_open).scatter(1, rows, True)
    placed = torch.where(is_open, placed, ids)
    if noise is not None:
        u = noise.uniform(ids.shape[1]) if isinstance(noise, ConfidenceNoise) else noise
        # below +inf even for infinite logits, so that what was not sampled always ranks last
        values = (values + tau * gumbel(u.to(values.dtype))).clamp(max=LARGEST).masked_fill(~was_sampled, float("inf"))
        placed = remask(placed, values, num_masked, mask_id)
    next_rows = (placed != mask_id).byte().argsort(dim=1, stable=True)[:, :next_open]
    return placed.contiguous(), next_rows.contiguous()
