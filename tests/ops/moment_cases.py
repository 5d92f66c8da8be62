"""How row moments are judged, for the ops that emit them."""

from __future__ import annotations

from torch import Tensor

from dcar_fast.reference._moments import PIECE, row_moments
from tests.tolerance import HALF_ULP


def check_moments(moments: Tensor, y: Tensor) -> None:
    """float32 moments of y (..., D) against float64, as near as sums of 64 numbers must be in any order: one rounding
    for each, and one for what is added. Squares are judged by their root, a length, of which a piece's error is a
    vector of 64 such errors."""
    exact = row_moments(y.double())
    assert (moments.shape, str(moments.dtype)) == (exact.shape, "torch.float32")
    largest = y.double().abs().amax(dim=-1, keepdim=True)  # of the row
    bound = (PIECE + 2) * HALF_ULP * largest
    (mean, squares), (true_mean, true_squares) = moments.double().unbind(dim=-1), exact.unbind(dim=-1)
    assert ((mean - true_mean).abs() <= bound).all(), (mean - true_mean).abs().max()
    apart = (squares.sqrt() - true_squares.sqrt()).abs()
    assert (apart <= PIECE**0.5 * bound).all(), apart.max()
