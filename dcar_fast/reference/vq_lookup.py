"""Nearest code of a codebook by cosine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_PER_BLOCK = 1 << 22  # rows are cut so that a block of scores takes 16 MB in float32


@torch.no_grad()
def vq_lookup(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Looks up the rows of z (M, C) in codebook (V, C); any floating dtype, both on one device.

    Both sides are L2-normalised over C (as ``torch.nn.functional.normalize``: divided by max(norm, 1e-12)), which makes
    the nearest code the one with the largest cosine:

        ids       (M,)    int64, lowest index on ties; codes that are equal tie exactly
        codes     (M, C)  normalise(codebook)[ids]
        residual  (M, C)  normalise(z) - codes

    Computed and returned in float32, also under autocast and whatever precision is allowed for matrix products (TF32
    and bfloat16 flip indices); in float64 if an input is float64. NaN counts as a score of -inf, so a row with NaN gets
    id 0, and a residual of NaN. No gradient flows: a quantiser adds its own straight-through estimator.
    """
    dtype = torch.float64 if torch.float64 in (z.dtype, codebook.dtype) else torch.float32
    rows = F.normalize(z.to(dtype), dim=1)  # (M, C)
    normalised = F.normalize(codebook.to(dtype), dim=1)  # (V, C)
    channels = normalised.T.contiguous()  # (C, V)
    ids = torch.cat([nearest(block, channels) for block in rows.split(max(1, SCORES_PER_BLOCK // len(codebook)))])
    codes = normalised[ids]  # (M, C)
    return ids, codes, rows - codes


def nearest(rows: Tensor, channels: Tensor) -> Tensor:
    """Ids (m,) of the codes, given as columns of ``channels`` (C, V), with the largest product with ``rows`` (m, C).

    A channel at a time rather than as a matrix product: that obeys autocast and TF32, and it may sum the channels of
    different codes in different orders, so that equal codes differ in the last bit and the lowest loses its tie.
    """
    scores = rows.new_zeros(rows.shape[0], channels.shape[1])  # (m, V)
    for c in range(channels.shape[0]):
        scores.addcmul_(rows[:, c : c + 1], channels[c])
    return scores.masked_fill_(scores.isnan(), float("-inf")).argmax(dim=1)
