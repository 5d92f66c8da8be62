"""Confidence-based re-masking by counting ranks: no sort, ties exact, any row length."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant


def tile(ranked: int, others: int, num_warps: int) -> Config:
    return Config({"BLOCK_RANKED": ranked, "BLOCK_OTHERS": others}, num_warps)


# 8 programs compare a row of 256 in one step. Long rows: narrower steps, and more positions for each read of the row.
RULES = (Rule({"tokens": 1024}, tile(32, 256, 8)), Rule({}, tile(64, 64, 8)))
TABLE = Table(
    "remask",
    shipped={"datacenter": RULES, "consumer": RULES},
    candidates=tuple(
        tile(ranked, others, warps) for ranked in (8, 16, 32, 64) for others in (64, 128, 256) for warps in (4, 8)
    ),
    scaling=("tokens",),
)
# confidence is read as integers: the bits of a float are a sign and a magnitude, which order as it does
BITS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


@triton.jit
def rank_key(bits, INFINITY: tl.constexpr):
    """A number that orders like the float with these bits; NaN is lowest, -0 equals +0."""
    if bits.dtype == tl.int64:
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
    elif bits.dtype == tl.int32:
        magnitude = bits & 0x7FFFFFFF
    else:
        magnitude = bits.to(tl.int32) & 0x7FFF
    return tl.where(magnitude > INFINITY, -INFINITY - 1, tl.where(bits < 0, -magnitude, magnitude))


@triton.jit
def remask_kernel(
    ids,  # (B, N) int64
    confidence,  # (B, N): the bits, as integers
    num_masked,  # (B,) int64
    out,  # (B, N) int64, contiguous
    mask_id,
    tokens,
    ids_row,
    ids_column,
    confidence_row,
    confidence_column,
    num_masked_row,
    INFINITY: tl.constexpr,  # its bits
    BLOCK_RANKED: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_RANKED)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    ranked = tl.program_id(0) % tiles * BLOCK_RANKED + tl.arange(0, BLOCK_RANKED)
    live = ranked < tokens
    k = tl.load(num_masked + row * num_masked_row)
    confidence += row * confidence_row
    place = ranked.to(tl.int64)
    own = rank_key(tl.load(confidence + place * confidence_column, mask=live, other=0), INFINITY)
    token = tl.load(ids + row * ids_row + place * ids_column, mask=live, other=0)

    # rank = #{j: key_j < key_i, or key_j = key_i and j < i}
    lower = tl.zeros((BLOCK_RANKED, BLOCK_OTHERS), tl.int32)
    for start in range(0, tokens, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)
        there = other < tokens
        key = rank_key(tl.load(confidence + other.to(tl.int64) * confidence_column, mask=there, other=0), INFINITY)
        key = tl.where(there, key, INFINITY + 1)  # above everything, so what is not there is not counted
        earlier = other[None, :] < ranked[:, None]
        lower += (key[None, :] < own[:, None] + earlier.to(own.dtype)).to(tl.int32)
    rank = tl.sum(lower, axis=1)
    # A k below 0 masks nothing and a k beyond N everything: the host does not look at it.
    tl.store(out + row * tokens + place, tl.where(rank < k, mask_id, token), mask=live)


def remask(
    ids: torch.Tensor, confidence: torch.Tensor, num_masked: torch.Tensor, mask_id: int, config: Config | None = None
) -> torch.Tensor:
    """ids (B, N) int64 with the ``num_masked[b]`` (int64) positions of row b that are lowest by (confidence, index) set
    to ``mask_id``. Any strides. One launch on the current device; formula and checks: ``reference/remask.py``,
    ``ops/remask.py``.
    """
    rows, tokens = ids.shape
    out = torch.empty(rows, tokens, dtype=torch.int64, device=ids.device)
    if out.numel() == 0:
        return out
    integer, infinity = BITS[confidence.dtype]
    config = config or TABLE.pick(ids.device, tokens=tokens)
    remask_kernel[(rows * triton.cdiv(tokens, config.blocks["BLOCK_RANKED"]),)](
        ids,
        confidence.view(integer),
        num_masked,
        out,
        mask_id,
        tokens,
        *ids.stride(),
        *confidence.stride(),
        *num_masked.stride(),
        INFINITY=infinity,
        **config.launch,
    )
    return out


def cases() -> list[Case]:
    """The token grids at 256, 512 and 1024 px, one image and sixteen."""

    def case(rows: int, tokens: int) -> Case:
        def prepare(device: torch.device):
            ids, confidence = torch.randint(0, 16384, (rows, tokens), device=device), torch.randn(rows, tokens)
            confidence, counts = confidence.to(device), torch.randint(0, tokens + 1, (rows,), device=device)
            return lambda config: remask(ids, confidence, counts, 16384, config)

        return Case(f"fp32 {rows}x{tokens}", TABLE, {"tokens": tokens}, prepare)

    return [case(rows, tokens) for rows in (1, 16) for tokens in (64, 256, 1024)]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """Rows of 256, the full-size model's, of every confidence type; and the tile for long rows."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
    shipped = [(dtype, 256) for dtype in names] + [(torch.float32, 4096)]
    return [
        Variant(
            name="remask",
            dtype=names[dtype],
            shape=f"N={tokens}",
            config=config,
            kernel=remask_kernel,
            signature={"ids": "*i64", "confidence": f"*i{torch.iinfo(BITS[dtype][0]).bits}"}
            | dict.fromkeys(("num_masked", "out"), "*i64")
            | dict.fromkeys(("mask_id", "tokens", "ids_row", "confidence_row"), "i32"),
            constexprs={"INFINITY": BITS[dtype][1]}
            | dict.fromkeys(("ids_column", "confidence_column", "num_masked_row"), 1),
            multiples_of_16=("mask_id", "tokens", "ids_row", "confidence_row"),
        )
        for dtype, tokens in shipped
        for config in TABLE.configs(capability, every, tokens=tokens)
    ]
