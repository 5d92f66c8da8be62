"""The end of a denoising step: last LN and linear of the head, guidance, posterior, noise."""

import triton
import triton.language as tl

from dcar_fast.kernels._denoise_linear import EPS, load_tile, load_vector, modulate
from dcar_fast.kernels._moments import row_moments
from dcar_fast.kernels.philox import STREAM_LATENT, normal, philox


@triton.jit
def counter_normals(seeds, tokens, step, row, first, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Standard normals (BLOCK_M, BLOCK_C) of the latent stream for channels from ``first``, a multiple of 4, on."""
    quad = first // 4 + tl.arange(0, BLOCK_C // 4)
    seed, token = tl.load(seeds + row)[:, None], tl.load(tokens + row)[:, None]
    word0, word1, word2, word3 = philox(seed, quad[None, :], token, step, STREAM_LATENT)
    z0, z1, z2, z3 = normal(word0, word1, word2, word3)
    # (BLOCK_M, BLOCK_C / 4, 2, 2): z0 z1 / z2 z3, so channels run 0 1 2 3
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK_M, BLOCK_C))


@triton.jit
def halves(tile, OWN_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Even and odd rows of a (2 OWN_M, BLOCK_C) tile: the conditional and the unconditional ones."""
    return tl.split(tl.permute(tl.reshape(tile, (OWN_M, 2, BLOCK_C)), (0, 2, 1)))


@triton.jit
def finish(
    x,
    epsilon,
    variance,
    noise,
    seeds,
    tokens,
    coefficients,
    out,
    row,
    live,
    first,
    channels,
    step,
    temperature,
    CLIP: tl.constexpr,
    COUNTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x_{k-1} of the rows from x_k, the guided epsilon and the variance value (BLOCK_M, BLOCK_C)."""
    channel = first + tl.arange(0, BLOCK_C)
    live = live[:, None] & (channel < channels)[None, :]
    place = row[:, None] * channels + channel[None, :]
    now = tl.load(x + place, mask=live, other=0.0)
    x0 = tl.load(coefficients) * now - tl.load(coefficients + 1) * epsilon
    if CLIP:
        x0 = tl.where(x0 > 1.0, 1.0, tl.where(x0 < -1.0, -1.0, x0))  # keeps NaN
    mean = tl.load(coefficients + 2) * x0 + tl.load(coefficients + 3) * now
    fraction = (variance + 1.0) * 0.5
    log_variance = fraction * tl.load(coefficients + 4) + (1.0 - fraction) * tl.load(coefficients + 5)
    if COUNTER:
        z = counter_normals(seeds, tokens, step, row, first, BLOCK_M, BLOCK_C)
    else:
        z = tl.load(noise + place, mask=live, other=0.0)
    noisy = mean + temperature * tl.exp(0.5 * log_variance) * z
    # the last step adds none, whatever the noise is
    tl.store(out + place, tl.where(tl.load(coefficients + 6) != 0.0, noisy, mean), mask=live)


@triton.jit(do_not_specialize=["step"])
def tail_kernel(
    h,  # (network rows, width): under guidance the first ``rows`` are conditional, the others unconditional
    moments,  # (network rows, pieces, 2)
    modulation,  # (network rows, stride)
    weight,  # (2 channels, width): epsilon, then the variance value
    bias,  # (2 channels,)
    x,  # (rows or 2 rows, channels) float32
    noise,  # as x, not read if COUNTER
    seeds,  # (rows of x,) int64, read if COUNTER
    tokens,
    coefficients,  # (8,) float32
    out,  # as x
    rows,
    channels,
    width,
    pieces,
    piece_width,
    stride,
    column,
    step,
    guidance,  # a number, or where it is stored if STORED
    temperature,
    GUIDED: tl.constexpr,
    STORED: tl.constexpr,
    BOTH: tl.constexpr,  # x holds the unconditional rows too
    FROM_CONDITIONAL: tl.constexpr,  # c + s (c - u), else u + s (c - u)
    CLIP: tl.constexpr,
    COUNTER: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program takes BLOCK_M rows of the network to BLOCK_C channels. Under guidance these rows alternate between a
    conditional one and the unconditional one that goes with it, so both meet in one program."""
    OWN_M: tl.constexpr = BLOCK_M // 2 if GUIDED else BLOCK_M
    own = tl.program_id(0).to(tl.int64) * OWN_M + tl.arange(0, OWN_M)
    live = own < rows
    own = tl.minimum(own, rows - 1)
    if GUIDED:
        pair = tl.arange(0, BLOCK_M)
        net = tl.minimum(tl.program_id(0).to(tl.int64) * OWN_M + pair // 2, rows - 1) + (pair % 2) * rows
    else:
        net = own
    mean, rstd = row_moments(moments + net * pieces * 2, pieces, piece_width, width, EPS, PIECES)

    first = tl.program_id(1) * BLOCK_C
    channel = first + tl.arange(0, BLOCK_C)
    place = weight + tl.minimum(channel, channels - 1).to(tl.int64)[None, :] * width
    kind = weight.dtype.element_ty
    epsilon = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    variance = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < width)[:, None]
        a = (load_tile(h, net, k, width, width) - mean[:, None]) * rstd[:, None]
        a = modulate(a, modulation, net, k, width, stride, column).to(kind)
        b = tl.load(place + k[:, None], mask=inside, other=0.0)
        epsilon = tl.dot(a, b, epsilon, input_precision="tf32x3")
        b = tl.load(place + channels * width + k[:, None], mask=inside, other=0.0)
        variance = tl.dot(a, b, variance, input_precision="tf32x3")
    epsilon += load_vector(bias, channel, channels)
    variance += load_vector(bias + channels, channel, channels)

    if GUIDED:
        conditional, unconditional = halves(epsilon, OWN_M, BLOCK_C)
        variance, other_variance = halves(variance, OWN_M, BLOCK_C)
        if STORED:
            scale = tl.load(guidance)
        else:
            scale = guidance
        if FROM_CONDITIONAL:
            epsilon = (1.0 + scale) * conditional - scale * unconditional
        else:
            epsilon = unconditional + scale * (conditional - unconditional)
        if BOTH:
            finish(x, epsilon, other_variance, noise, seeds, tokens, coefficients, out, own + rows, live, first,
                   channels, step, temperature, CLIP, COUNTER, OWN_M, BLOCK_C)  # fmt: skip
    finish(x, epsilon, variance, noise, seeds, tokens, coefficients, out, own, live, first,
           channels, step, temperature, CLIP, COUNTER, OWN_M, BLOCK_C)  # fmt: skip
