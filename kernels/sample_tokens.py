"""The logits head and guided Gumbel-max sampling in one: the logits never reach memory.

Three launches. The first guides the hidden states, which the head's linearity allows, so that there is one product
instead of two. The second multiplies a tile of rows with a tile of the vocabulary and keeps the best of each row. The
third takes the best of all tiles. The noise comes from (row, vocabulary id), not from the tile: no configuration
changes what is drawn.
"""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels import philox
from dcar_fast.kernels._sampling import (
    COUNTER,
    NO_NOISE,
    UNIFORMS,
    Splits,
    annealed,
    best_of,
    best_of_splits_variant,
    interleave4,
    noise_arguments,
    noise_kind,
    recorded_gumbel,
    without_nan,
)
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant


def tile(rows: int, codes: int, depth: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_ROWS": rows, "BLOCK_CODES": codes, "BLOCK_DEPTH": depth}, num_warps, num_stages)


HALF = (Rule({}, tile(64, 128, 64, 8, 4)),)
HALF_CONSUMER = (Rule({}, tile(64, 128, 64, 8, 3)),)
SINGLE = (Rule({}, tile(64, 128, 32, 8, 3)),)
TABLE_HALF = Table(
    "sample_tokens.16bit",
    shipped={"datacenter": HALF, "consumer": HALF_CONSUMER},
    candidates=tuple(
        tile(rows, codes, 64, warps, stages)
        for rows, codes, warps in ((32, 128, 4), (64, 64, 4), (64, 128, 8), (64, 256, 8), (128, 128, 8))
        for stages in (3, 4)
    ),
    scaling=("rows",),
)
# three products in TF32 for each of float32's: larger tiles and deeper ones spill
TABLE_SINGLE = Table(
    "sample_tokens.float32",
    shipped={"datacenter": SINGLE, "consumer": SINGLE},
    candidates=tuple(
        tile(rows, codes, 32, warps, stages)
        for rows, codes, warps in ((32, 128, 4), (64, 64, 4), (64, 128, 8))
        for stages in (2, 3)
    ),
    scaling=("rows",),
)
GUIDE = Config({"BLOCK": 1024}, 4)  # a small memory-bound kernel: not worth tuning
GROUP = tl.constexpr(16)  # tiles of rows that share the tiles of the vocabulary in the second-level cache
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def table_for(dtype: torch.dtype) -> Table:
    """The configurations for a weight of this type."""
    return TABLE_SINGLE if dtype == torch.float32 else TABLE_HALF


@triton.jit
def guided(cond, uncond, place, uncond_place, inside, guidance, GUIDED: tl.constexpr):
    hidden = tl.load(cond + place, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        hidden += guidance * (hidden - tl.load(uncond + uncond_place, mask=inside, other=0.0).to(tl.float32))
    return hidden


@triton.jit
def guide_kernel(
    cond,  # (R, D)
    uncond,  # (R, D), not read unless GUIDED
    hidden,  # (R, D), the weight's type
    scale,  # (R,) float32: hidden is to be multiplied by it
    width,
    cond_stride,
    uncond_stride,
    guidance,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cond += row * cond_stride
    uncond += row * uncond_stride
    factor = 1.0
    if hidden.dtype.element_ty == tl.float16:
        # guidance may leave float16's range: a power of two brings the row's largest value to 1..2
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            place = start + tl.arange(0, BLOCK)
            x = tl.abs(guided(cond, uncond, place, place, place < width, guidance, GUIDED))
            largest = tl.where(x > largest, x, largest)
        bits = tl.max(largest, axis=0).to(tl.int32, bitcast=True)
        exponent = tl.minimum(tl.maximum((bits >> 23) - 127, -126), 126)
        factor = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(scale + row, ((127 + exponent) << 23).to(tl.float32, bitcast=True))
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = guided(cond, uncond, place, place, place < width, guidance, GUIDED) * factor
        tl.store(hidden + row * width + place, x.to(hidden.dtype.element_ty), mask=place < width)


@triton.jit(do_not_specialize=["rows", "step"])
def sample_tokens_kernel(
    hidden,  # (R, D), guided
    scale,  # (R,) float32, read if hidden is float16
    weight,  # (V, D), hidden's type
    bias,  # (V,)
    uniforms,  # (R, V) float32, not read unless NOISE is UNIFORMS
    seeds,  # (R,) int64, not read unless NOISE is COUNTER
    tokens,  # (R,) int64, not read unless NOISE is COUNTER
    scores,  # (R, splits) float32
    ids,  # (R, splits) int32
    logits,  # (R, splits) float32
    rows,
    codes,
    width,
    weight_stride,
    step,
    softmax_temperature,
    tau,
    NOISE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    splits = tl.cdiv(codes, BLOCK_CODES)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    in_group = GROUP * splits
    group = tl.program_id(0) // in_group
    group_tiles = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + tl.program_id(0) % in_group % group_tiles
    split = tl.program_id(0) % in_group // group_tiles

    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    code = split * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
    live, inside = row < rows, code < codes
    wide_row = row.to(tl.int64)

    depth = tl.arange(0, BLOCK_DEPTH)
    a = hidden + wide_row[:, None] * width + depth[None, :]
    b = weight + code.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    logit = tl.zeros((BLOCK_ROWS, BLOCK_CODES), tl.float32)
    for start in range(0, width, BLOCK_DEPTH):
        x = tl.load(a + start, mask=live[:, None] & (start + depth < width)[None, :], other=0.0)
        w = tl.load(b + start, mask=inside[None, :] & (start + depth < width)[:, None], other=0.0)
        logit = tl.dot(x, w, logit, input_precision="tf32x3")  # float32: as accurate as a float32 product

    if hidden.dtype.element_ty == tl.float16:
        logit *= tl.load(scale + row, mask=live, other=0.0)[:, None]
    logit += tl.load(bias + code, mask=inside, other=0.0).to(tl.float32)[None, :]
    logit = tl.where(inside[None, :], annealed(logit, softmax_temperature), -float("inf"))
    score = logit
    if NOISE == COUNTER:
        seed, token = tl.load(seeds + row, mask=live, other=0), tl.load(tokens + row, mask=live, other=0)
        quad = split * (BLOCK_CODES // 4) + tl.arange(0, BLOCK_CODES // 4)
        w0, w1, w2, w3 = philox.philox(seed[:, None], quad[None, :], token[:, None], step, philox.STREAM_TOKEN)
        u = philox.uniform(interleave4(w0, w1, w2, w3))
        score = without_nan(logit + tau * philox.gumbel(u))
    elif NOISE == UNIFORMS:
        u = uniforms + wide_row[:, None] * codes + code[None, :]
        u = tl.load(u, mask=live[:, None] & inside[None, :], other=0.5)
        score = without_nan(logit + tau * recorded_gumbel(u))
    best, index, chosen = best_of(score, logit, code[None, :])
    place = (wide_row * splits + split)[:, None]
    tl.store(scores + place, best, mask=live[:, None])
    tl.store(ids + place, index, mask=live[:, None])
    tl.store(logits + place, chosen, mask=live[:, None])


def sample_tokens(
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    guidance: float,
    softmax_temperature: float,
    tau: float,
    uniforms: torch.Tensor | None,
    seeds: torch.Tensor | None,
    tokens: torch.Tensor | None,
    step: int,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (R,) int64 and confidence (R,) float32 from hidden states (R, D), weight (V, D) and bias (V,), each float32,
    float16 or bfloat16. The guided hidden states are rounded to the weight's type, products summed in float32. Noise:
    ``uniforms`` (R, V) float32, or ``seeds`` and ``tokens`` (R,) int64 and ``step``. Three launches on the current
    device; formula and checks: ``reference/sample_tokens.py``, ``ops/sample_tokens.py``.
    """
    rows, width = cond.shape
    codes = weight.shape[0]
    config = config or table_for(weight.dtype).pick(cond.device, rows=rows)
    blocks = config.blocks
    splits = Splits(rows, triton.cdiv(codes, blocks["BLOCK_CODES"]), cond.device)
    if rows:
        cond, uncond, weight = (x if x is None or x.stride(1) == 1 else x.contiguous() for x in (cond, uncond, weight))
        hidden = torch.empty(rows, width, dtype=weight.dtype, device=cond.device)
        scale = torch.empty(rows, dtype=torch.float32, device=cond.device)
        guide_kernel[(rows,)](
            cond,
            cond if uncond is None else uncond,
            hidden,
            scale,
            width,
            cond.stride(0),
            0 if uncond is None else uncond.stride(0),
            float(guidance),
            GUIDED=uncond is not None,
            **GUIDE.launch,
        )
        sample_tokens_kernel[(triton.cdiv(rows, blocks["BLOCK_ROWS"]) * splits.ids.shape[1],)](
            hidden,
            scale,
            weight,
            bias.contiguous(),
            *noise_arguments(uniforms, seeds, tokens, hidden),
            splits.scores,
            splits.ids,
            splits.logits,
            rows,
            codes,
            width,
            weight.stride(0),
            step,
            float(softmax_temperature),
            float(tau),
            NOISE=noise_kind(uniforms, tau),
            **config.launch,
        )
    return splits.best()


def cases() -> list[Case]:
    """512 px: the tokens of one image and of sixteen, width 1152, 16384 codes, guided."""

    def case(rows: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            cond, uncond = torch.randn(2, rows, 1152, device=device, dtype=dtype)
            weight, bias = torch.randn(16384, 1152, device=device, dtype=dtype) / 34, torch.randn(16384, device=device)
            seeds, tokens = torch.arange(rows, device=device) // 256, torch.arange(rows, device=device) % 256
            settings = {"guidance": 3.5, "softmax_temperature": 1.0, "tau": 1.0, "step": 1}
            noise = {"uniforms": None, "seeds": seeds, "tokens": tokens}
            return lambda config: sample_tokens(cond, uncond, weight, bias, **settings, **noise, config=config)

        return Case(f"{DTYPES[dtype]} {rows}x1152x16384", table_for(dtype), {"rows": rows}, prepare)

    return [case(rows, dtype) for rows in (256, 4096) for dtype in (torch.float32, torch.bfloat16)]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The full-size head with counter noise, at tau = 0, and with recorded noise; and the kernel that guides."""
    pointers = {"uniforms": "*fp32", "seeds": "*i64", "tokens": "*i64"}
    outputs = {"scores": "*fp32", "ids": "*i32", "logits": "*fp32"}
    head = [
        Variant(
            name="sample_tokens",
            dtype=DTYPES[dtype],
            shape=f"D=1152 V=16384{kind}",
            config=config,
            kernel=sample_tokens_kernel,
            signature=dict.fromkeys(("hidden", "weight", "bias"), f"*{DTYPES[dtype]}")
            | {"scale": "*fp32", **pointers, **outputs}
            | dict.fromkeys(("rows", "codes", "width", "weight_stride", "step"), "i32")
            | dict.fromkeys(("softmax_temperature", "tau"), "fp32"),
            constexprs={"NOISE": noise},
            multiples_of_16=("codes", "width", "weight_stride"),
            tensor_cores=True,
        )
        for dtype in DTYPES
        for kind, noise in (("", COUNTER.value), (" greedy", NO_NOISE.value), (" recorded", UNIFORMS.value))
        for config in table_for(dtype).configs(capability, every, rows=256)
    ]
    guide = [
        Variant(
            name="sample_tokens.guide",
            dtype=dtype,
            shape="D=1152",
            config=GUIDE,
            kernel=guide_kernel,
            signature=dict.fromkeys(("cond", "uncond", "hidden"), f"*{dtype}")
            | {"scale": "*fp32", "guidance": "fp32"}
            | dict.fromkeys(("width", "cond_stride", "uncond_stride"), "i32"),
            constexprs={"GUIDED": True},
            multiples_of_16=("width", "cond_stride", "uncond_stride"),
        )
        for dtype in DTYPES.values()
    ]
    return [*head, *guide, best_of_splits_variant("sample_tokens")]
