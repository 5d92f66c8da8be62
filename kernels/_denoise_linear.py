"""The linear layers of the diffusion head, each with what stands before and after it.

LayerNorm needs a whole row of the residual stream, which no tile sees. The producer of a row therefore leaves mean and
sum of squared deviations of each of its tiles ("moments": two floats for BLOCK_N columns), and the consumer combines
them with Chan's formula, which does not cancel when the mean is large. The other way, a first loop over the row in the
consumer, would read every row once more in each column of tiles, and wait for it before the first product.

Normalising inside the product (NORMALISE) saves a launch, but every column of tiles reads modulations and normalises
again: three tiles to read instead of one. With many rows ``modulate_kernel`` does it once, before a plain product.
"""

import triton
import triton.language as tl

from dcar_fast.kernels._moments import row_moments

EPS = tl.constexpr(1e-6)


@triton.jit
def load_vector(vector, k, width):
    """(1, BLOCK_K) float32 of a (width,) vector; 0 from ``width`` on."""
    return tl.load(vector + k, mask=k < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_tile(matrix, row, k, width, stride):
    """(BLOCK_M, BLOCK_K) float32 of a matrix with ``width`` columns; 0 from there on."""
    return tl.load(matrix + row[:, None] * stride + k[None, :], mask=(k < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def modulate(tile, modulation, row, k, width, stride, column):
    """tile * (1 + scale) + shift; the shifts start at ``column`` of the modulations, the scales follow them."""
    shift = load_tile(modulation + column, row, k, width, stride)
    scale = load_tile(modulation + column + width, row, k, width, stride)
    return tile * (1.0 + scale) + shift


@triton.jit
def modulate_kernel(
    x,  # (source_rows, width), row r is r % source_rows
    moments,  # (source_rows, pieces, 2)
    norm_weight,  # (width,)
    norm_bias,
    modulation,  # (rows, stride)
    out,  # (rows, width)
    rows,
    source_rows,
    width,
    pieces,
    piece_width,
    stride,
    column,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = LN(x) * (1 + scale) + shift, rounded to the type of ``out``."""
    tiles = tl.cdiv(width, BLOCK_K)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    live = (row < rows)[:, None] & (k < width)[None, :]
    row = tl.minimum(row, rows - 1)
    source = row % source_rows
    mean, rstd = row_moments(moments + source * pieces * 2, pieces, piece_width, width, EPS, PIECES)
    tile = (load_tile(x, source, k, width, width) - mean[:, None]) * rstd[:, None]
    tile = tile * load_vector(norm_weight, k, width) + load_vector(norm_bias, k, width)
    tile = modulate(tile, modulation, row, k, width, stride, column)
    tl.store(out + row[:, None] * width + k[None, :], tile.to(out.dtype.element_ty), mask=live)


@triton.jit
def linear_kernel(
    x,  # (rows, inner) if GATED, else (source_rows, inner), and row r is r % source_rows
    x_moments,  # (source_rows, pieces, 2), read if NORMALISE
    norm_weight,  # (inner,), read if NORMALISE
    norm_bias,
    modulation,  # (rows, stride): shift and scale from column on if NORMALISE, the gate from column on if GATED
    weight,  # (outer, inner)
    bias,  # (outer,)
    residual,  # (source_rows, outer), read if GATED
    out,  # (rows, outer)
    out_moments,  # (rows, cdiv(outer, BLOCK_N), 2), written if MOMENTS
    rows,
    source_rows,
    inner,
    outer,
    pieces,
    piece_width,
    stride,
    column,
    PIECES: tl.constexpr,
    SILU: tl.constexpr,
    GATED: tl.constexpr,
    MOMENTS: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = f(x) W^T + b with f one of identity and LN + modulation; out is one of y, silu(y), residual + gate * y.

    Sums in float32, products of x and W rounded to W's type (float32: three TF32 products).
    """
    tiles = tl.cdiv(outer, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    row = tl.minimum(row, rows - 1)  # rows beyond the last repeat it, their results are dropped
    source = row % source_rows
    x_row = row if GATED else source
    if NORMALISE:
        mean, rstd = row_moments(x_moments + source * pieces * 2, pieces, piece_width, inner, EPS, PIECES)

    kind = weight.dtype.element_ty
    weights = weight + tl.minimum(n, outer - 1).to(tl.int64)[None, :] * inner
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if NORMALISE:
            a = (load_tile(x, x_row, k, inner, inner) - mean[:, None]) * rstd[:, None]
            a = a * load_vector(norm_weight, k, inner) + load_vector(norm_bias, k, inner)
            a = modulate(a, modulation, row, k, inner, stride, column)
        else:
            a = tl.load(x + x_row[:, None] * inner + k[None, :], mask=(k < inner)[None, :], other=0.0)
        b = tl.load(weights + k[:, None], mask=(k < inner)[:, None], other=0.0)
        y = tl.dot(a.to(kind), b, y, input_precision="tf32x3")

    y += load_vector(bias, n, outer)
    if SILU:
        y = y * tl.sigmoid(y)
    if GATED:
        gate = load_tile(modulation + column, row, n, outer, stride)
        y = load_tile(residual, source, n, outer, outer) + gate * y
    y = y.to(out.dtype.element_ty)
    inside = (n < outer)[None, :]
    tl.store(out + row[:, None] * outer + n[None, :], y, mask=live[:, None] & inside)
    if MOMENTS:  # of what was stored: LayerNorm sees the rounded values
        y = y.to(tl.float32)
        mean = tl.sum(tl.where(inside, y, 0.0), axis=1) / tl.minimum(outer - first, BLOCK_N)
        squares = tl.sum(tl.where(inside, (y - mean[:, None]) * (y - mean[:, None]), 0.0), axis=1)
        place = out_moments + (row * tiles + tl.program_id(0) % tiles) * 2
        tl.store(place, mean, mask=live)
        tl.store(place + 1, squares, mask=live)
