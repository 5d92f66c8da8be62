"""Rows in float8 (e4m3) with one scale each, normalised before where their producer left the moments. A program holds
its rows whole in registers: x is read once."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels._moments import PIECE, row_moments
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
WIDTH, HIDDEN = 1152, 4608  # of the full-size model
LARGEST = tl.constexpr(448.0)  # that e4m3 holds
SMALLEST = tl.constexpr(2.0**-126)  # scale, the smallest float32 of full precision


def tile(rows: int, num_warps: int) -> Config:
    return Config({"BLOCK_ROWS": rows}, num_warps)


# 16 or 32 elements a thread up to 8192 columns
RULES = (
    Rule({"width": 512}, tile(4, 4)),
    Rule({"width": 2048}, tile(1, 4)),
    Rule({"width": 8192}, tile(1, 8)),
    Rule({}, tile(1, 32)),
)
TABLE = Table(
    "quantize_rows",
    shipped={"datacenter": RULES, "consumer": RULES},
    candidates=tuple(tile(rows, warps) for rows in (1, 2, 4) for warps in (2, 4, 8, 16)),
    scaling=("rows",),
)


@triton.jit
def quantize_rows_kernel(
    x,  # (rows, width)
    moments,  # (rows, pieces, 2) float32; None: no LayerNorm
    values,  # (rows, width) float8e4nv
    scales,  # (rows,) float32
    rows,
    width,
    pieces,
    eps,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    WHOLE: tl.constexpr,  # a power of two, at least width
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    column = tl.arange(0, WHOLE)[None, :]
    inside = live[:, None] & (column < width)
    place = row[:, None] * width + column
    f = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if moments is not None:
        at = moments + tl.where(live, row, 0) * pieces * 2
        mean, rstd = row_moments(at, pieces, PIECE, width, eps, PIECES)
        f = tl.where(inside, (f - mean[:, None]) * rstd[:, None], 0.0)
    # as integers absolute values are in the same order, and NaN is above infinity: a maximum of floats drops NaN
    bits = tl.max(f.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = bits.to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(largest, LARGEST), SMALLEST)
    scale = tl.where(bits == 0, 1.0, tl.where(largest < float("inf"), scale, float("nan")))
    tl.store(scales + row, scale, mask=live)
    f = tl.div_rn(f, tl.broadcast_to(scale[:, None], f.shape))
    tl.store(values + place, f.to(tl.float8e4nv), mask=inside)


def quantize_rows(
    x: torch.Tensor, *, moments: torch.Tensor | None = None, eps: float = 1e-6, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, N, K) -> values (B, N, K) float8_e4m3fn and scales (B, N) float32. One launch on the current device, more
    only to copy what is not contiguous. Formula and checks: ``reference/quantize_rows.py``, ``ops/quantize_rows.py``.
    """
    images, tokens, width = x.shape
    rows = images * tokens
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(images, tokens, dtype=torch.float32, device=x.device)
    if values.numel():
        config = config or TABLE.pick(x.device, rows=rows, width=width)
        quantize_rows_kernel[(triton.cdiv(rows, config.blocks["BLOCK_ROWS"]),)](
            x.contiguous(),
            None if moments is None else moments.contiguous(),
            values,
            scales,
            rows,
            width,
            triton.cdiv(width, PIECE),
            eps,
            **constants(width),
            **config.launch,
        )
    return values, scales


def constants(width: int) -> dict[str, int]:
    pieces = triton.next_power_of_2(triton.cdiv(width, PIECE))
    return {"PIECES": pieces, "PIECE": PIECE, "WHOLE": triton.next_power_of_2(width)}


def cases() -> list[Case]:
    """What the full-size model's blocks quantise at 512 px, one image and sixteen with their unconditional rows; on
    GPUs that have the type."""

    def case(images: int, width: int, normed: bool, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            x = torch.randn(images, 256, width, device=device).to(dtype)
            pieces = x.float().unflatten(2, (-1, PIECE))
            moments = torch.stack((pieces.mean(dim=3), pieces.var(dim=3, correction=0) * PIECE), dim=3)
            return lambda config: quantize_rows(x, moments=moments if normed else None, config=config)

        label = f"{TYPES[dtype]} {images}x256x{width}" + (" normed" if normed else "")
        return Case(label, TABLE, {"rows": images * 256, "width": width}, prepare, least=89)

    return [
        case(images, width, normed, torch.bfloat16)
        for images in (2, 32)
        for width, normed in ((WIDTH, True), (HIDDEN, False))
    ]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The full-size model's widths; none below sm_89, which has no instruction for the type."""
    if capability < 89:
        return []
    return [
        _variant(width, normed, kind, config)
        for width, normed in ((WIDTH, True), (HIDDEN, False))
        for kind in TYPES.values()
        for config in TABLE.configs(capability, every, rows=512, width=width)
    ]


def _variant(width: int, normed: bool, kind: str, config: Config) -> Variant:
    tensors = {"x": kind, "values": "fp8e4nv", "scales": "fp32"} | ({"moments": "fp32"} if normed else {})
    return Variant(
        name="quantize_rows",
        dtype=kind,
        shape=f"{width}" + (" normed" if normed else ""),
        config=config,
        kernel=quantize_rows_kernel,
        signature={name: f"*{of}" for name, of in tensors.items()}
        | dict.fromkeys(("rows", "width", "pieces"), "i32")
        | {"eps": "fp32"},
        constexprs=({} if normed else {"moments": None}) | constants(width),
        multiples_of_16=("rows", "width"),
    )
