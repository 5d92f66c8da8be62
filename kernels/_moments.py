"""Row moments: mean and sum of squared deviations of each piece of a row, two floats that the producer of a row leaves
for a LayerNorm that reads it. Chan's formula combines them, which does not cancel when the mean is large."""

import triton
import triton.language as tl

PIECE = 64  # columns of a piece where ops hand moments to each other
WIDTH = tl.constexpr(PIECE)


@triton.jit
def row_moments(at, pieces, piece_width, width, eps, PIECES: tl.constexpr):
    """Mean and 1 / standard deviation, (BLOCK,) float32, of rows of ``width`` columns. ``at`` (BLOCK,) points to each
    row's moments (pieces, 2), of pieces of ``piece_width``; PIECES: a power of two, at least ``pieces``."""
    piece = tl.arange(0, PIECES)
    live = (piece < pieces)[None, :]
    place = at[:, None] + piece[None, :] * 2
    means = tl.load(place, mask=live, other=0.0)
    squares = tl.load(place + 1, mask=live, other=0.0)
    count = tl.minimum(width - piece * piece_width, piece_width).to(tl.float32)[None, :]
    mean = tl.sum(tl.where(live, means * count, 0.0), axis=1) / width
    apart = means - mean[:, None]
    squares = tl.sum(tl.where(live, squares + count * apart * apart, 0.0), axis=1)
    return mean, 1.0 / tl.sqrt_rn(squares / width + eps)


@triton.jit
def store_moments(moments, y, row, live, first, width):
    """Writes the moments (rows, ceil(width / 64), 2) of the tile ``y`` (BLOCK_M, BLOCK_N), whose columns begin at
    ``first``, a multiple of 64, as is BLOCK_N. ``row`` (BLOCK_M,) int64; those that are ``live`` are written."""
    PIECES: tl.constexpr = y.shape[1] // WIDTH
    start = first + WIDTH * tl.arange(0, PIECES)  # of each piece
    count = tl.minimum(width - start, WIDTH)
    inside = (tl.arange(0, WIDTH)[None, :] < count[:, None])[None, :, :]
    y = tl.reshape(y.to(tl.float32), (y.shape[0], PIECES, WIDTH))
    mean = tl.sum(tl.where(inside, y, 0.0), axis=2) / tl.maximum(count, 1)[None, :]
    apart = tl.where(inside, y - mean[:, :, None], 0.0)
    squares = tl.sum(apart * apart, axis=2)
    place = moments + (row[:, None] * tl.cdiv(width, WIDTH) + (start // WIDTH)[None, :]) * 2
    mask = live[:, None] & (count > 0)[None, :]
    tl.store(place, mean, mask=mask)
    tl.store(place + 1, squares, mask=mask)
