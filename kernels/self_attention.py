"""Self-attention with q and k normalised over the full width: row statistics, then flash attention.

Two launches. The first writes mean and rstd of every row of q and k, 16 bytes for what was 2 D numbers, and the second
normalises with them: queries when a block of them is loaded, once, and keys on the scores, which the algebra in
``_attention.py`` allows. Where the projection before left the row moments of q and k the first launch is not needed:
the second one combines them itself. Writing normalised q and k instead would cost another pass of 2 N D numbers, and
normalising keys when they are loaded would do it again for every block of queries and take them through registers on
their way to the tensor cores.
"""

import math

import torch
import triton
import triton.language as tl

from dcar_fast.kernels._attention import TYPES, Normalisation, attend, attention_kernel, constants, table, table_sizes
from dcar_fast.kernels._moments import PIECE
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant

TABLE = table("self_attention.attention")
HEADS, HEAD = 16, 72  # of the full-size model


def rows_by(rows: int, width: int, num_warps: int) -> Config:
    return Config({"BLOCK_ROWS": rows, "BLOCK_WIDTH": width}, num_warps)


# wider rows are walked over in steps
STATISTICS_RULES = (
    Rule({"width": 512}, rows_by(4, 512, 4)),
    Rule({"width": 1024}, rows_by(2, 1024, 4)),
    Rule({}, rows_by(1, 2048, 4)),
)
STATISTICS = Table(
    "self_attention.statistics",
    shipped={"datacenter": STATISTICS_RULES, "consumer": STATISTICS_RULES},
    candidates=tuple(
        rows_by(rows, width, warps) for rows, width in ((1, 2048), (2, 2048), (4, 512), (8, 128)) for warps in (2, 4, 8)
    ),
    scaling=("rows",),
)


@triton.jit
def statistics_kernel(
    qkv,  # (B, N, 3 WIDTH), any strides, the last one 1
    out,  # (4, B, N) float32: mean and rstd of q, then of k
    rows,  # B N
    tokens,  # N
    qkv_image,
    qkv_row,
    width,
    eps,
    ALIGNED: tl.constexpr,  # a power of two that divides the strides
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    part = tl.program_id(0) % 2  # q or k
    row = tl.program_id(0).to(tl.int64) // 2 * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    place = tl.multiple_of(row // tokens * qkv_image + row % tokens * qkv_row, ALIGNED)
    at = qkv + tl.multiple_of(part * width, ALIGNED) + place[:, None]
    column = tl.arange(0, BLOCK_WIDTH)
    # two passes, the second out of the cache: E[x^2] - E[x]^2 would lose what is small beside the mean
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        inside = live[:, None] & (start + column < width)[None, :]
        total += tl.load(at + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=1) / width
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        inside = live[:, None] & (start + column < width)[None, :]
        x = tl.load(at + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - mean[:, None], 0.0)
        total += centred * centred
    rstd = 1.0 / tl.sqrt_rn(tl.sum(total, axis=1) / width + eps)
    tl.store(out + 2 * part * tl.cast(rows, tl.int64) + row, mean, mask=live)
    tl.store(out + (2 * part + 1) * tl.cast(rows, tl.int64) + row, rstd, mask=live)


def row_statistics(qkv: torch.Tensor, eps: float, config: Config | None = None) -> torch.Tensor:
    """(4, B, N) float32 from qkv (B, N, 3D): the mean of q's rows, 1 / sqrt(variance + eps) of q's rows, and the same
    of k's. One launch."""
    images, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    rows = images * tokens
    out = torch.empty(4, images, tokens, dtype=torch.float32, device=qkv.device)
    config = config or STATISTICS.pick(qkv.device, width=width, itemsize=qkv.element_size(), rows=rows)
    statistics_kernel[(2 * triton.cdiv(rows, config.blocks["BLOCK_ROWS"]),)](
        qkv,
        out,
        rows,
        tokens,
        *qkv.stride()[:2],
        width,
        eps,
        ALIGNED=math.gcd(16 // qkv.element_size(), width, *qkv.stride()[:2]),
        **config.launch,
    )
    return out


def self_attention(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    q_bias: torch.Tensor,
    k_weight: torch.Tensor,
    heads: int,
    eps: float,
    moments: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Attention (B, N, D) of the q, k and v side by side in qkv (B, N, 3D), of one type out of ``TYPES``; q and k go
    through LayerNorm over all D first, with weights (D,) of any floating type. ``moments`` (B, N, 3D / 64, 2): the row
    moments of qkv. ``config`` is the attention's.

    Two launches on the current device, one with moments, more only to copy what is strided in its last dimension.
    Formula and checks: ``reference/self_attention.py``, ``ops/self_attention.py``.
    """
    if qkv.numel() == 0:
        return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    if qkv.stride(2) != 1:
        qkv = qkv.contiguous()
    weights = (weight.contiguous() for weight in (q_weight, q_bias, k_weight))
    if moments is None:
        normalisation = Normalisation(row_statistics(qkv, eps), None, *weights, eps)
    else:
        normalisation = Normalisation(None, moments.contiguous(), *weights, eps)
    q, k, v = (part.unflatten(2, (heads, -1)) for part in qkv.chunk(3, dim=2))
    return attend(q, k, v, None, normalisation, TABLE, config).flatten(2)


def cases() -> list[Case]:
    """The full-size model at 256, 512 and 1024 px, one image and sixteen with their unconditional rows: attention as
    the model runs it, with moments, and the statistics of those who have none."""

    def inputs(images: int, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        width = HEADS * HEAD
        qkv = torch.randn(images, tokens, 3 * width, device=device).to(dtype)
        return qkv, *(torch.randn(width, device=device).to(dtype) for _ in range(3))

    def attention(images: int, tokens: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            arguments = inputs(images, tokens, dtype, device)
            pieces = arguments[0].float().unflatten(2, (-1, PIECE))
            moments = torch.stack((pieces.mean(dim=3), pieces.var(dim=3, correction=0) * PIECE), dim=3)
            return lambda config: self_attention(*arguments, HEADS, 1e-5, moments, config)

        sizes = table_sizes(HEAD, dtype, images * HEADS * tokens, moments=True)
        return Case(f"{TYPES[dtype]} {images}x{tokens}", TABLE, sizes, prepare)

    def statistics(images: int, tokens: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            qkv, *_ = inputs(images, tokens, dtype, device)
            return lambda config: row_statistics(qkv, 1e-5, config)

        sizes = {"width": HEADS * HEAD, "itemsize": dtype.itemsize, "rows": images * tokens}
        return Case(f"{TYPES[dtype]} {images}x{tokens}", STATISTICS, sizes, prepare)

    return [
        case(images, tokens, dtype)
        for case in (statistics, attention)
        for dtype in TYPES
        for images in (2, 32)
        for tokens in (64, 256, 1024)
    ]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The full-size model's shapes: both kernels, with and without moments, few and many rows, 256 tokens that blocks
    divide and 1000 that they do not."""
    return [
        *(_statistics_variant(config, dtype) for dtype in TYPES for config in _statistics_configs(capability, every)),
        *(
            _attention_variant(config, dtype, images, tokens, moments)
            for dtype in TYPES
            for moments in (False, True)
            for images, tokens in ((2, 256), (32, 256), (32, 1000))
            for config in TABLE.configs(capability, every, **table_sizes(HEAD, dtype, images * HEADS * tokens, moments))
        ),
    ]


def _statistics_configs(capability: int, every: bool) -> list[Config]:
    return STATISTICS.configs(capability, every, width=HEADS * HEAD, itemsize=2, rows=512)


def _statistics_variant(config: Config, dtype: torch.dtype) -> Variant:
    sizes = ("rows", "tokens", "qkv_image", "qkv_row", "width")
    return Variant(
        name="self_attention.statistics",
        dtype=TYPES[dtype],
        shape=f"D={HEADS * HEAD}",
        config=config,
        kernel=statistics_kernel,
        signature={"qkv": f"*{TYPES[dtype]}", "out": "*fp32", "eps": "fp32"} | dict.fromkeys(sizes, "i32"),
        constexprs={"ALIGNED": 16 // dtype.itemsize},
        multiples_of_16=sizes,
    )


def _attention_variant(config: Config, dtype: torch.dtype, images: int, tokens: int, moments: bool) -> Variant:
    tensors, weights = ("q", "k", "v", "out"), ("q_weight", "q_bias", "k_weight")
    sizes = ("queries", "keys", "heads", "images")
    strides = [f"{x}_{stride}" for x in "qkv" for stride in ("image", "row", "head")]
    ragged = tokens % config.blocks["BLOCK_KEYS"] != 0
    source = {"moments": "*fp32", "eps": "fp32", "pieces": "i32"} if moments else {"statistics": "*fp32"}
    given = (*source, *weights)
    return Variant(
        name="self_attention.attention",
        dtype=TYPES[dtype],
        shape=f"d={HEAD} {images}x{tokens}{' moments' if moments else ''}",
        config=config,
        kernel=attention_kernel,
        signature=dict.fromkeys((*tensors, *weights), f"*{TYPES[dtype]}")
        | {"scale": "fp32"}
        | source
        | dict.fromkeys((*sizes, *strides), "i32"),
        constexprs={"lengths": None}
        | constants(HEAD, dtype, ragged, given, HEADS * HEAD // PIECE if moments else None),
        multiples_of_16=(
            "heads",
            *(() if ragged else ("queries", "keys")),
            *(stride for stride in strides if not stride.endswith("head")),
        ),
        tensor_cores=True,
    )
