"""The sampling noise in Triton: the words of Philox4x32-10 and what ``dcar_fast/noise.py`` makes of them.

    key     = (low, high) 32-bit words of the image's 64-bit seed
    counter = (element // 4, token, step, stream), the value is word ``element % 4`` of the result

The words are those of the reference, bit for bit. Logarithm, sine and cosine are written out here: the arguments need
no special cases, the compiler's cosine keeps a table in local memory for large ones, and one formula for all targets
leaves nothing to their approximations.
"""

import triton
import triton.language as tl

STREAM_TOKEN = tl.constexpr(0)
STREAM_CONFIDENCE = tl.constexpr(1)
STREAM_LATENT_INIT = tl.constexpr(2)
STREAM_LATENT = tl.constexpr(3)
STREAM_CHOICE = tl.constexpr(4)


@triton.jit
def philox(seed, quad, token, step, stream):
    """Four uint32 words for the seed (int64) and counter; the integers, blocks or scalars, broadcast."""
    # tl.cast also takes Python's own numbers, which constants and arguments equal to 1 are
    c0, c1 = tl.cast(quad, tl.uint32), tl.cast(token, tl.uint32)
    c2, c3 = tl.cast(step, tl.uint32), tl.cast(stream, tl.uint32)
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def uniform(word):
    """((word >> 9) + 0.5) * 2^-23: float32, exact, strictly inside (0, 1)."""
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def log_normal_number(x):
    """log of a positive, finite, normal float32, to 2 ulp. Relative accuracy holds next to 1 too, where the Gumbel
    noise of the likely winners comes from.

    x = 2^e m with m in [2/3, 4/3), so t = m - 1 is exact; log m = t + t^2 P(t), P fitted to |t| <= 1/3 with the least
    relative error of the whole (2.6e-8).
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    t = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = t * 0.14026351230012457 - 0.15388540780769086
    p = p * t + 0.13995808515194263
    p = p * t - 0.16415960573482388
    p = p * t + 0.20011168577958816
    p = p * t - 0.2500781890445426
    p = p * t + 0.3333319813858927
    p = p * t - 0.4999993607865066
    return exponent.to(tl.float32) * 8.262958294867817e-08 + (p * (t * t) + t)  # ln 2 / 2^23


@triton.jit
def gumbel(u):
    """-log(-log u) for u in (0, 1), as :func:`uniform` gives it; u = 0 and u = 1 would need a guard."""
    return -log_normal_number(-log_normal_number(u))


@triton.jit
def normal_pair(u, v):
    """Two standard normals from two uniforms (Box-Muller): sqrt(-2 ln u) times (cos, sin)(2 pi v).

    The quarter turn nearest to v is taken off exactly, so the polynomials see at most an eighth of a turn.
    """
    radius = tl.sqrt_rn(-2.0 * log_normal_number(u))
    turns = v * 4.0
    quarter = tl.floor(turns + 0.5)
    f = turns - quarter
    z = f * f
    sine = (((z * -0.0046021769964794184 + 0.07968022806708416) * z - 0.645963478641695) * z + 1.5707963219668037) * f
    cosine = (((z * 0.0009036317 - 0.0208600713) * z + 0.2536692039) * z - 1.2337005406) * z + 1.0
    turn = quarter.to(tl.int32)
    odd = (turn & 1) != 0
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    first = tl.where(((turn + 1) & 2) != 0, -first, first)  # the cosine is negative in quarters 1 and 2
    second = tl.where((turn & 2) != 0, -second, second)  # the sine in 2 and 3
    return radius * first, radius * second


@triton.jit
def normal(word0, word1, word2, word3):
    """Four standard normals from the four words of one counter, as elements 0..3 of the quad."""
    a, b = normal_pair(uniform(word0), uniform(word1))
    c, d = normal_pair(uniform(word2), uniform(word3))
    return a, b, c, d
