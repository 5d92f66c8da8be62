"""Guided Gumbel-max sampling of one token per row from given logits: one pass over them."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels import philox
from dcar_fast.kernels._sampling import (
    COUNTER,
    NO_NOISE,
    NOWHERE,
    UNIFORMS,
    Splits,
    annealed,
    best_of_splits_variant,
    interleave4,
    noise_arguments,
    noise_kind,
    recorded_gumbel,
    without_nan,
)
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant


def tile(columns: int, splits: int, num_warps: int) -> Config:
    return Config({"BLOCK_COLUMNS": columns, "SPLITS": splits}, num_warps)


# few rows are split, so that every multiprocessor has work
RULES = (Rule({"rows": 512}, tile(1024, 4, 4)), Rule({}, tile(2048, 1, 4)))
TABLE = Table(
    "sample_from_logits",
    shipped={"datacenter": RULES, "consumer": RULES},
    candidates=tuple(
        tile(columns, splits, warps) for columns in (1024, 2048, 4096) for splits in (1, 2, 4, 8) for warps in (4, 8)
    ),
    scaling=("rows", "columns"),
)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def gumbel_bound(u):
    """Not less than the computed ``gumbel(u)``, for a few instructions.

    -log(-log u) <= -log(1 - u), and the bits of a positive float x, read as an integer, are at most
    2^23 (127 + log2 x). The factor and the summand cover the rounding here and in ``gumbel``.
    """
    bits = (1.0 - u).to(tl.int32, bitcast=True).to(tl.float32)
    return (127.0 - bits * 1.1920928955078125e-07) * 0.6931480 + 2e-5


@triton.jit(do_not_specialize=["step"])
def sample_from_logits_kernel(
    cond,  # (R, V)
    uncond,  # (R, V), not read unless GUIDED
    uniforms,  # (R, V) float32, not read unless NOISE is UNIFORMS
    seeds,  # (R,) int64, not read unless NOISE is COUNTER
    tokens,  # (R,) int64, not read unless NOISE is COUNTER
    scores,  # (R, SPLITS) float32
    ids,  # (R, SPLITS) int32
    logits,  # (R, SPLITS) float32
    columns,
    cond_stride,
    uncond_stride,
    step,
    guidance,
    softmax_temperature,
    tau,
    GUIDED: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    if NOISE == COUNTER:
        seed, token = tl.load(seeds + row), tl.load(tokens + row)

    best, chosen = tl.full((), -float("inf"), tl.float32), tl.full((), -float("inf"), tl.float32)
    index = tl.full((), NOWHERE, tl.int32)
    for block in range(split * blocks // SPLITS, (split + 1) * blocks // SPLITS):
        column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        inside = column < columns
        logit = tl.load(cond + row * cond_stride + column, mask=inside, other=-float("inf")).to(tl.float32)
        if GUIDED:
            other = tl.load(uncond + row * uncond_stride + column, mask=inside, other=0.0).to(tl.float32)
            logit += guidance * (logit - other)
        logit = tl.where(inside, annealed(logit, softmax_temperature), -float("inf"))

        if NOISE == COUNTER:
            quad = block * (BLOCK_COLUMNS // 4) + tl.arange(0, BLOCK_COLUMNS // 4)
            w0, w1, w2, w3 = philox.philox(seed, quad, token, step, philox.STREAM_TOKEN)
            u = philox.uniform(interleave4(w0, w1, w2, w3))
            bound = without_nan(logit + tau * gumbel_bound(u))
        elif NOISE == UNIFORMS:
            u = tl.load(uniforms + row * columns + column, mask=inside, other=0.5)
            bound = without_nan(logit + tau * recorded_gumbel(u))
        else:
            bound = logit
        if tl.max(bound, axis=0) > best:  # the logarithms are for blocks that may hold a new best
            score = bound
            if NOISE == COUNTER:
                score = without_nan(logit + tau * philox.gumbel(u))
            block_best = tl.max(score, axis=0)
            if block_best > best:  # strict: a tie stays with the lower id
                best = block_best
                index = tl.min(tl.where(score == best, column, NOWHERE), axis=0)
                chosen = tl.max(tl.where(column == index, logit, -float("inf")), axis=0)
    place = row * SPLITS + split
    tl.store(scores + place, best)
    tl.store(ids + place, index)
    tl.store(logits + place, chosen)


def sample_from_logits(
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
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
    """ids (R,) int64 and confidence (R,) float32 from logits (R, V): float32, float16 or bfloat16, cond and uncond each
    of its own type. Noise: ``uniforms`` (R, V) float32, or ``seeds`` and ``tokens`` (R,) int64 and ``step``. Two
    launches on the current device; formula and checks: ``reference/sample_from_logits.py``,
    ``ops/sample_from_logits.py``.
    """
    rows, columns = cond.shape
    config = config or TABLE.pick(cond.device, rows=rows, columns=columns)
    splits = Splits(rows, config.blocks["SPLITS"], cond.device)
    if rows:
        # rows may lie apart; columns that do are made contiguous by a copy
        cond, uncond = (x if x is None or x.stride(1) == 1 else x.contiguous() for x in (cond, uncond))
        sample_from_logits_kernel[(rows * config.blocks["SPLITS"],)](
            cond,
            cond if uncond is None else uncond,
            *noise_arguments(uniforms, seeds, tokens, cond),
            splits.scores,
            splits.ids,
            splits.logits,
            columns,
            cond.stride(0),
            0 if uncond is None else uncond.stride(0),
            step,
            float(guidance),
            float(softmax_temperature),
            float(tau),
            GUIDED=uncond is not None,
            NOISE=noise_kind(uniforms, tau),
            **config.launch,
        )
    return splits.best()


def cases() -> list[Case]:
    """512 px: 256 rows of one image and 4096 of sixteen, 16384 codes, guided."""

    def case(rows: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            cond, uncond = torch.randn(2, rows, 16384, device=device, dtype=dtype)
            seeds = torch.arange(rows, device=device) // 256
            tokens = torch.arange(rows, device=device) % 256
            settings = {"guidance": 3.5, "softmax_temperature": 1.0, "tau": 1.0, "step": 1}
            noise = {"uniforms": None, "seeds": seeds, "tokens": tokens}
            return lambda config: sample_from_logits(cond, uncond, **settings, **noise, config=config)

        return Case(f"{DTYPES[dtype]} {rows}x16384", TABLE, {"rows": rows, "columns": 16384}, prepare)

    return [case(rows, dtype) for rows in (256, 4096) for dtype in (torch.float32, torch.bfloat16)]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The full-size head: guided with counter noise, greedy without guidance, guided with recorded noise."""
    kinds = [("", True, COUNTER.value), (" greedy", False, NO_NOISE.value), (" recorded", True, UNIFORMS.value)]
    pointers = {"uniforms": "*fp32", "seeds": "*i64", "tokens": "*i64"}
    outputs = {"scores": "*fp32", "ids": "*i32", "logits": "*fp32"}
    return [
        Variant(
            name="sample_from_logits",
            dtype=dtype,
            shape=f"{rows}x16384{kind}",
            config=config,
            kernel=sample_from_logits_kernel,
            signature={"cond": f"*{dtype}", "uncond": f"*{dtype}", **pointers, **outputs}
            | dict.fromkeys(("columns", "cond_stride", "uncond_stride", "step"), "i32")
            | dict.fromkeys(("guidance", "softmax_temperature", "tau"), "fp32"),
            constexprs={"GUIDED": guided, "NOISE": noise},
            multiples_of_16=("columns", "cond_stride", "uncond_stride"),
        )
        for dtype in DTYPES.values()
        for rows in (256, 4096)
        for kind, guided, noise in kinds
        for config in TABLE.configs(capability, every, rows=rows, columns=16384)
    ] + [best_of_splits_variant("sample_from_logits")]
