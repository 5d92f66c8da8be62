"""Token embeddings plus positions in one pass, with the row moments that the first LayerNorm reads."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels._moments import PIECE, store_moments
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
WIDTH = 1152  # of the full-size model


def tile(rows: int, width: int, num_warps: int) -> Config:
    return Config({"BLOCK_ROWS": rows, "BLOCK_WIDTH": width}, num_warps)


RULES = (Rule({"rows": 1024}, tile(4, 128, 2)), Rule({}, tile(8, 128, 4)))
TABLE = Table(
    "embed_tokens",
    shipped={"datacenter": RULES, "consumer": RULES},
    candidates=tuple(
        tile(rows, width, warps) for rows in (4, 8, 16) for width in (64, 128, 256) for warps in (2, 4, 8)
    ),
    scaling=("rows",),
)


@triton.jit
def embed_tokens_kernel(
    ids,  # (rows,) int64
    table,  # (entries, width)
    positions,  # (tokens, width), row r takes number r % tokens
    out,  # (rows, width)
    moments,  # (rows, ceil(width / 64), 2) float32
    rows,
    tokens,
    entries,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(width, BLOCK_WIDTH)
    first = tl.program_id(0) % tiles * BLOCK_WIDTH
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    token = tl.load(ids + row, mask=live, other=-1)
    known = ((token >= 0) & (token < entries))[:, None]
    column = first + tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = column < width
    # a token that is not in the table becomes NaN: the host does not look at ids
    x = tl.load(table + token[:, None] * width + column, mask=known & inside, other=float("nan")).to(tl.float32)
    place = positions + (row % tokens)[:, None] * width + column
    x += tl.load(place, mask=live[:, None] & inside, other=0.0).to(tl.float32)
    x = x.to(out.dtype.element_ty)
    tl.store(out + row[:, None] * width + column, x, mask=live[:, None] & inside)
    store_moments(moments, x, row, live, first, width)


def embed_tokens(
    ids: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """table[ids] + positions (B, N, D) in the table's type and its row moments (B, N, ceil(D / 64), 2) float32, of ids
    (B, N) int64, table (V, D), positions (N, D); NaN rows where an id is outside 0..V-1. One launch on the current
    device, more only to copy what is not contiguous. Formula and checks: ``reference/embed_tokens.py``,
    ``ops/embed_tokens.py``.
    """
    (images, tokens), (entries, width) = ids.shape, table.shape
    rows = images * tokens
    out = torch.empty(images, tokens, width, dtype=table.dtype, device=table.device)
    moments = torch.empty(images, tokens, triton.cdiv(width, PIECE), 2, dtype=torch.float32, device=table.device)
    if out.numel():
        config = config or TABLE.pick(table.device, rows=rows, width=width)
        blocks = triton.cdiv(rows, config.blocks["BLOCK_ROWS"]) * triton.cdiv(width, config.blocks["BLOCK_WIDTH"])
        tensors = (ids.contiguous(), table.contiguous(), positions.contiguous(), out, moments)
        embed_tokens_kernel[(blocks,)](*tensors, rows, tokens, entries, width, **config.launch)
    return out, moments


def cases() -> list[Case]:
    """The full-size model at 512 px, one image and sixteen."""

    def case(images: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            ids = torch.randint(0, 16385, (images, 256), device=device)
            table, positions = (torch.randn(size, WIDTH, device=device).to(dtype) for size in (16385, 256))
            return lambda config: embed_tokens(ids, table, positions, config)

        return Case(f"{TYPES[dtype]} {images}x256", TABLE, {"rows": images * 256, "width": WIDTH}, prepare)

    return [case(images, dtype) for images in (1, 16) for dtype in (torch.float32, torch.bfloat16)]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The full-size model's width, few rows and many."""
    integers = ("rows", "tokens", "entries", "width")
    return [
        Variant(
            name="embed_tokens",
            dtype=kind,
            shape=f"{rows}x{WIDTH}",
            config=config,
            kernel=embed_tokens_kernel,
            signature={"ids": "*i64", "moments": "*fp32"}
            | dict.fromkeys(("table", "positions", "out"), f"*{kind}")
            | dict.fromkeys(integers, "i32"),
            constexprs={},
            multiples_of_16=("rows", "tokens", "width"),
        )
        for kind in TYPES.values()
        for rows in (256, 4096)
        for config in TABLE.configs(capability, every, rows=rows, width=WIDTH)
    ]
