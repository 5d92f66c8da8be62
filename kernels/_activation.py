"""The activations of the decoder's kernels, on float32 tiles."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
ROOT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """ "none", "relu", "silu" or "gelu" (its tanh approximation) of float32 values; NaN stays NaN. EXACT is for results
    that are kept in float32: for 16-bit results silu takes 6 machine instructions instead of 19 and is off by a few
    units in float32's last place."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # a maximum may drop NaN
    elif ACTIVATION == "silu":
        if EXACT:
            x = tl.div_rn(x, 1.0 + tl.exp(-x))
        else:
            root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))  # a division takes twice the instructions
            x = x * root * root
    elif ACTIVATION == "gelu":  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        twice = 2 * ROOT_2_OVER_PI * x * (1.0 + 0.044715 * x * x)
        if EXACT:
            x = tl.div_rn(x, 1.0 + tl.exp(-twice))
        else:
            root = tl.rsqrt(1.0 + tl.exp2(twice * -LOG2E))
            x = x * root * root
    return x
