"""The one rule by which a fast result is accepted.

Values: the error against a float64 (or float32) truth is at most twice the error of the same op in plain PyTorch at the
same precision, plus the rounding of the truth to the result's type. Indices: equal, or the float64 scores of the two
choices differ by less than a stated rounding bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_ULP = 2.0**-24  # relative rounding error of one float32 operation


def check_close(got: Tensor, plain: Tensor, truth: Tensor, what: str = "result") -> None:
    """Asserts the rule for values. ``got``: the fast result; ``plain``: the same op in plain PyTorch, same type;
    ``truth``: the same op in float64 on the same inputs. NaN and infinities must sit at the same places."""
    assert (got.shape, got.dtype) == (plain.shape, plain.dtype) == (truth.shape, plain.dtype), what
    truth = truth.to(got.device, torch.float64)
    rounded = truth.to(got.dtype)
    finite = rounded.isfinite()
    assert torch.equal(got[~finite].nan_to_num(nan=-1.0), rounded[~finite].nan_to_num(nan=-1.0)), f"{what}: not finite"
    assert got[finite].isfinite().all(), f"{what}: NaN or infinity where a number is due"
    if not finite.any():
        return
    error, baseline, rounding = (
        (value[finite].double() - truth[finite]).abs().max().item() for value in (got, plain, rounded)
    )
    allowed = 2 * baseline + rounding
    assert error <= allowed, f"{what}: error {error:.3g}, allowed 2 x {baseline:.3g} + {rounding:.3g}"


def check_choices(got: Tensor, scores: Tensor, bound: float, what: str = "choices") -> None:
    """Asserts the rule for indices. ``got`` (R,) int64; ``scores`` (R, V) float64, of which the largest is right, up to
    ``bound``."""
    assert got.dtype == torch.int64 and got.shape == scores.shape[:1], what
    assert ((got >= 0) & (got < scores.shape[1])).all(), f"{what}: index out of range"
    lost = scores.max(dim=1).values - scores.gather(1, got[:, None])[:, 0]
    assert not (lost > bound).any(), f"{what}: score {lost.max():.3g} below the best, allowed {bound:.3g}"


def cosine_bound(channels: int) -> float:
    """How far two float32 cosines of C channels can be out of order. Normalising costs (C/2 + 2) half ulps on either
    side, the sum of products C: 2 C + 4 for one cosine of at most 1, twice that for two."""
    return 2 * (2 * channels + 4) * HALF_ULP
