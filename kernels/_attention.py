"""Flash attention, shared by cross_attention (keys of differing number) and self_attention (normalised q and k).

Softmax is kept online, in float32 and base 2, over blocks of keys that are walked over in order: no atomics, so a
repeated call gives the same bits. Head sizes need not be powers of two: see :func:`split`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dcar_fast.kernels._moments import PIECE as PIECE_WIDTH
from dcar_fast.kernels._moments import row_moments
from dcar_fast.kernels.configs import Config, Rule, Table

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
LOG2_E = math.log2(math.e)
PIECE = tl.constexpr(PIECE_WIDTH)
FEW_ROWS = 32 * 1024  # (image, head, query) triples up to which small blocks are needed to give every SM something


def blocks(queries: int, keys: int, num_warps: int, num_stages: int = 2) -> Config:
    return Config({"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys}, num_warps, num_stages)


def table(name: str) -> Table:
    """Sizes: ``head`` as padded by :func:`split`, ``itemsize`` in bytes, ``rows`` = images x heads x queries,
    ``moments``: 1 with row moments, which take registers, else 0."""

    def rules(many_rows: Config, many_rows_of_128: Config, float32: Config, keys: int) -> tuple[Rule, ...]:
        """``keys``: of a block with moments, in 16-bit types."""
        return (
            Rule({"itemsize": 2, "head": 128, "rows": FEW_ROWS, "moments": 0}, blocks(64, 64, 4)),
            Rule({"itemsize": 2, "head": 128, "rows": FEW_ROWS}, blocks(64, keys, 4)),
            Rule({"itemsize": 2, "head": 80, "moments": 0}, many_rows),
            Rule({"itemsize": 2, "head": 80}, blocks(128, keys, 8, many_rows.num_stages)),
            Rule({"itemsize": 2, "head": 128}, many_rows_of_128),
            Rule({"itemsize": 2, "head": 256}, blocks(64, 32, 8)),
            Rule({"head": 80, "moments": 0}, float32),
            Rule({"head": 80}, blocks(32, 16, 8)),
            Rule({"head": 128}, blocks(16, 16, 4)),
            Rule({}, blocks(16, 16, 8, 1)),  # runs, but is not made for
        )

    blackwell = rules(blocks(128, 64, 8, 3), blocks(128, 64, 8, 3), blocks(64, 32, 8), 64)
    shipped = {
        "consumer": rules(blocks(128, 64, 8), blocks(64, 32, 4), blocks(32, 16, 4), 32),
        "datacenter": rules(blocks(128, 64, 8), blocks(128, 64, 8), blocks(32, 16, 4), 32),
        "sm_90": rules(blocks(128, 64, 8), blocks(128, 64, 8), blocks(64, 32, 4), 64),
        "sm_100": blackwell,
        "sm_103": blackwell,
    }
    candidates = [
        blocks(queries, keys, warps, stages)
        for queries, keys, warps in ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8))
        for stages in (2, 3)
    ]
    return Table(name, shipped, tuple(candidates), scaling=("rows",))


def table_sizes(head: int, dtype: torch.dtype, rows: int, moments: bool = False) -> dict[str, int]:
    return {"head": split(head).padded, "itemsize": dtype.itemsize, "rows": rows, "moments": int(moments)}


class Split(NamedTuple):
    """A head size as the matrix instructions see it: a power of two and, if that takes fewer columns, a second one."""

    main: int
    tail: int

    @property
    def padded(self) -> int:
        return self.main + self.tail


def split(head: int) -> Split:
    """72 = 64 + 16 (8 of them masked) instead of 128; 128 = 128; 40 = 32 + 16; a part has at least 16 columns, because
    that is the least a matrix instruction takes."""
    whole = max(16, triton.next_power_of_2(head))
    main = whole // 2
    tail = max(16, triton.next_power_of_2(head - main)) if head > main else 0
    return Split(main, tail) if main >= 16 and main + tail < whole else Split(whole, 0)


@triton.jit
def normalised_queries(x, mean, rstd, q_weight, q_bias, k_weight, column, WIDTH: tl.constexpr):
    """LayerNorm of x, (queries, columns) of one head, times the keys' weight; zero in columns beyond ``WIDTH``."""
    inside = column < WIDTH
    scale = tl.load(q_weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(q_bias + column, mask=inside, other=0.0).to(tl.float32)
    keys = tl.load(k_weight + column, mask=inside, other=0.0).to(tl.float32)
    normal = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    return ((normal * scale[None, :] + shift[None, :]) * keys[None, :]).to(x.dtype)


@triton.jit
def attention_kernel(
    q,  # (B, N, H, HEAD), any strides, the last one 1
    k,  # (B, T, H, HEAD), likewise
    v,
    out,  # (B, N, H, HEAD), contiguous
    lengths,  # (B,) int64: the keys of each image; None: all T
    statistics,  # (4, B, N) float32: mean and rstd of q's rows, then of k's
    moments,  # (B, N, 3 pieces, 2) float32, row moments of q, k and v; both None: q and k are taken as they are
    q_weight,  # (H, HEAD), like the next two only with one of them
    q_bias,
    k_weight,
    eps,  # with moments
    pieces,
    queries,
    keys,
    heads,
    images,
    scale,  # of the scores, times log2 e
    q_image,
    q_row,
    q_head,
    k_image,
    k_row,
    k_head,
    v_image,
    v_row,
    v_head,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    RAGGED: tl.constexpr,  # the last block of keys may be incomplete
    ALIGNED: tl.constexpr,  # a power of two that divides all strides; loads are as wide as it allows
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,  # a power of two, at least pieces
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    FLOAT32: tl.constexpr = q.dtype.element_ty == tl.float32
    NORMALISED: tl.constexpr = statistics is not None or moments is not None
    # one grid dimension, because the others end at 65,535; neighbours share an image and head, so its keys stay in L2
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    image = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    query = (tl.program_id(0) % tiles * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)).to(tl.int64)
    live = (query < queries)[:, None]
    length = keys
    if lengths is not None:
        # the host does not look at lengths: whatever they are, nothing outside the tensors is read
        length = tl.minimum(tl.maximum(tl.load(lengths + image), 0), keys).to(tl.int32)

    main = tl.arange(0, MAIN)
    tail = MAIN + tl.arange(0, TAIL if TAIL else 16)
    in_main = (main < HEAD)[None, :]
    in_tail = (tail < HEAD)[None, :]
    q += tl.multiple_of(image * q_image + head * q_head, ALIGNED)
    k += tl.multiple_of(image * k_image + head * k_head, ALIGNED)
    v += tl.multiple_of(image * v_image + head * v_head, ALIGNED)
    q_at = q + tl.multiple_of(query * q_row, ALIGNED)[:, None]
    q_main = tl.load(q_at + main[None, :], mask=live & in_main, other=0.0)
    if TAIL:
        q_tail = tl.load(q_at + tail[None, :], mask=live & in_tail, other=0.0)
    if NORMALISED:
        # LayerNorm of the keys needs no pass over them. With n = LN(query) and key y of mean m and deviation 1/r,
        #   n . ((y - m) r w + b) = r ((n w) . y - m sum(n w)) + n . b
        # where the last term is the same for all keys and so falls out of the softmax: w goes into the query, once per
        # program, and r and m into the scores. The sum is taken of n w as rounded, so that m cancels exactly.
        if moments is not None:
            moments += image * queries * pieces * 6
            # rows beyond the last repeat it, here and below: what comes of them is dropped
            at = moments + tl.minimum(query, queries - 1) * pieces * 6
            mean, rstd = row_moments(at, pieces, PIECE, pieces * PIECE, eps, PIECES)
            moments += pieces * 2  # those of the keys
        else:
            places = images * tl.cast(queries, tl.int64)
            at = statistics + image * queries + query
            mean = tl.load(at, mask=query < queries, other=0.0)
            rstd = tl.load(at + places, mask=query < queries, other=0.0)
            k_mean_at = statistics + 2 * places + image * keys
            k_rstd_at = k_mean_at + places
        q_weight += head * HEAD
        q_bias += head * HEAD
        k_weight += head * HEAD
        q_main = normalised_queries(q_main, mean, rstd, q_weight, q_bias, k_weight, main, HEAD)
        q_sum = tl.sum(q_main.to(tl.float32), axis=1)
        if TAIL:
            q_tail = normalised_queries(q_tail, mean, rstd, q_weight, q_bias, k_weight, tail, HEAD)
            q_sum += tl.sum(q_tail.to(tl.float32), axis=1)

    largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    out_main = tl.zeros((BLOCK_QUERIES, MAIN), tl.float32)
    if TAIL:
        out_tail = tl.zeros((BLOCK_QUERIES, TAIL), tl.float32)
    step = tl.arange(0, BLOCK_KEYS)
    k_at = k + tl.multiple_of(step.to(tl.int64) * k_row, ALIGNED)[:, None]
    v_at = v + tl.multiple_of(step.to(tl.int64) * v_row, ALIGNED)[:, None]
    for start in range(0, length, BLOCK_KEYS):
        # loads are masked in values too: what is ignored may hold NaN, and 0 * NaN would not be 0
        inside = start + step < length if RAGGED else step < BLOCK_KEYS
        k_main = tl.load(k_at + main[None, :], mask=inside[:, None] & in_main, other=0.0)
        if TAIL:
            k_tail = tl.load(k_at + tail[None, :], mask=inside[:, None] & in_tail, other=0.0)
        if NORMALISED:
            if moments is not None:
                k_moments_at = moments + tl.minimum(start + step, length - 1).to(tl.int64) * pieces * 6
                k_mean, k_rstd = row_moments(k_moments_at, pieces, PIECE, pieces * PIECE, eps, PIECES)
            else:
                k_mean = tl.load(k_mean_at + start + step, mask=inside, other=0.0)
                k_rstd = tl.load(k_rstd_at + start + step, mask=inside, other=0.0)
            if FLOAT32:
                # (n w) . y and m sum(n w) cancel, which float32 would feel where |m| >> 1/r: subtract first
                k_main -= k_mean[:, None]
                if TAIL:
                    k_tail -= k_mean[:, None]
        scores = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
        if TAIL:
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
        if NORMALISED:
            if not FLOAT32:
                scores -= q_sum[:, None] * k_mean[None, :]
            scores *= k_rstd[None, :]
        if RAGGED:
            scores = tl.where(inside[None, :], scores, float("-inf"))

        new = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)  # keeps exp2(-inf - -inf) out
        decay = tl.exp2((largest - base) * scale)
        if FLOAT32:
            weights = tl.exp2((scores - base[:, None]) * scale)  # the largest is exactly 1
        else:
            weights = tl.exp2(scores * scale - (base * scale)[:, None])  # one instruction less, and exact enough
        total = total * decay + tl.sum(weights, axis=1)
        v_main = tl.load(v_at + main[None, :], mask=inside[:, None] & in_main, other=0.0)
        weights = weights.to(v_main.dtype)
        out_main = tl.dot(weights, v_main, out_main * decay[:, None], input_precision=PRECISION)
        if TAIL:
            v_tail = tl.load(v_at + tail[None, :], mask=inside[:, None] & in_tail, other=0.0)
            out_tail = tl.dot(weights, v_tail, out_tail * decay[:, None], input_precision=PRECISION)
        largest = new
        k_at += tl.multiple_of(BLOCK_KEYS * tl.cast(k_row, tl.int64), ALIGNED)
        v_at += tl.multiple_of(BLOCK_KEYS * tl.cast(v_row, tl.int64), ALIGNED)

    # no keys: zeros. Keys whose scores are all -inf: 0 * (1 / 0), NaN as in PyTorch
    share = tl.div_rn(1.0, tl.where(length > 0, total, 1.0))[:, None]
    out_at = out + ((image * queries + query) * heads + head)[:, None] * HEAD
    kind = out.dtype.element_ty
    tl.store(out_at + main[None, :], (out_main * share).to(kind), mask=live & in_main)
    if TAIL:
        tl.store(out_at + tail[None, :], (out_tail * share).to(kind), mask=live & in_tail)


class Normalisation(NamedTuple):
    """What turns q and k into LayerNorm(q) and LayerNorm(k): (4, B, N) float32 statistics of both or row moments (B, N,
    3D / 64, 2) of q, k and v, contiguous, the weights (D,), and the eps that moments lack. There is no bias of k: it
    adds the same to all scores of a query."""

    statistics: torch.Tensor | None
    moments: torch.Tensor | None
    q_weight: torch.Tensor
    q_bias: torch.Tensor
    k_weight: torch.Tensor
    eps: float


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    normalisation: Normalisation | None,
    table: Table,
    config: Config | None,
) -> torch.Tensor:
    """softmax(q k^T d^-0.5) v for q (B, N, H, d), k and v (B, T, H, d) -> (B, N, H, d), contiguous. One launch."""
    images, queries, heads, head = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    # strides are the kernel's business, but a row's numbers must lie side by side
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    parts, keys = split(head), k.shape[1]
    normalisation = normalisation or (None,) * len(Normalisation._fields)
    moments = normalisation[1]
    pieces = None if moments is None else moments.shape[2] // 3
    sizes = table_sizes(head, q.dtype, images * heads * queries, moments is not None)
    config = config or table.pick(q.device, **sizes)
    tiles = triton.cdiv(queries, config.blocks["BLOCK_QUERIES"])
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    attention_kernel[(tiles * heads * images,)](
        q,
        k,
        v,
        out,
        lengths,
        *normalisation,
        pieces,
        queries,
        keys,
        heads,
        images,
        head**-0.5 * LOG2_E,
        *strides,
        HEAD=head,
        MAIN=parts.main,
        TAIL=parts.tail,
        RAGGED=lengths is not None or keys % config.blocks["BLOCK_KEYS"] != 0,
        ALIGNED=math.gcd(16 // q.element_size(), *strides),
        PRECISION=precision(q.dtype, q.device.type),
        PIECES=padded(pieces),
        **config.launch,
    )
    return out


def precision(dtype: torch.dtype, device_type: str = "cuda") -> str:
    """How tl.dot multiplies. 16-bit products are exact: nothing to choose. float32 is taken apart into three bfloat16,
    six products of which matter: tensor cores do them in the time of three TF32 products, and three bfloat16
    hold all 24 bits where two TF32 ("tf32x3") hold 22, so that a single key gives its value back exactly. Truncation
    by the tensor cores stays within a block, because the accumulator is added outside of them. "ieee" would be exact
    too, but without tensor cores; the interpreter knows nothing else.
    """
    return "bf16x6" if dtype == torch.float32 and device_type == "cuda" else "ieee"


def padded(pieces: int | None) -> int | None:
    """The width of a tile of row moments."""
    return None if pieces is None else triton.next_power_of_2(pieces)


NORMALISATION = (*Normalisation._fields, "pieces")


def constants(
    head: int, dtype: torch.dtype, ragged: bool, given: Iterable[str] = (), pieces: int | None = None
) -> Mapping[str, Any]:
    """The kernel's constants as :func:`attend` sets them for a model's own tensors, for the offline compiler.
    ``given``: which of ``NORMALISATION`` are arguments; the others are None."""
    parts = split(head)
    return {
        **dict.fromkeys(name for name in NORMALISATION if name not in given),
        "PIECES": padded(pieces),
        "HEAD": head,
        "MAIN": parts.main,
        "TAIL": parts.tail,
        "RAGGED": ragged,
        "ALIGNED": math.gcd(16 // dtype.itemsize, head),
        "PRECISION": precision(dtype),
    }
