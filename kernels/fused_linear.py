"""A linear layer with LayerNorm or softmax before it and activation and residual after it, in one launch.

LayerNorm reads the row moments that the producer of x left (``_moments.py``), and there are two ways to apply it. In
16-bit types the products are those of x as it is, and the sums are normalised: rstd (x W^T) - rstd mean colsum(W). The
main loop stays that of a plain product, with no pass through registers on the way to the tensor cores, and x is not
rounded once more; what cancels where the mean is large does so in float32, far below the rounding of the result. In
float32 it would show, so there the tiles of x are normalised in registers.

The softmax is over groups of 16, 32 or 64 columns, whole in a tile of x, and is made again for each column of tiles.

Float8 comes with a scale for each row of x and of the weight, which multiply the sums. Hopper's matrix instructions for
it keep about 14 bits while they add up, so what they have is moved to float32 sums after every 128 products. These take
as many registers again: tiles are half as large as they could be for 16 bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dcar_fast.kernels._activation import LOG2E, activate
from dcar_fast.kernels._moments import PIECE, row_moments, store_moments
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FLOAT8 = torch.float8_e4m3fn
FEW = 1024  # rows up to which there are too few programs for large tiles
WIDTH, HIDDEN, GROUP = 1152, 4608, 16  # of the full-size model, with prompts of up to 16 tokens
HEADS = 16
TOGETHER = tl.constexpr(8)  # rows of tiles that are walked over together, so that their weights come from the L2 cache


def tile(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps, num_stages)


HALF = {"bytes": 2}  # size of a weight
EXACT_EVERY = tl.constexpr(128)  # at most as many products of float8 are added up before a move to float32 sums


def rules(softmax: Config, wide: Config) -> tuple[Rule, ...]:
    return (
        Rule({"bytes": 1, "rows": FEW}, tile(64, 64, 128, 4, 4)),
        Rule({"bytes": 1}, tile(128, 128, 128, 8, 3)),
        Rule({**HALF, "rows": FEW}, tile(64, 64, 64, 4, 4)),
        Rule({**HALF, "together": 64}, tile(64, 128, 64, 4, 3)),
        Rule({**HALF, "group": 0, "width": 2048}, tile(128, 128, 64, 8, 3)),
        Rule({**HALF, "group": 0}, wide),
        Rule(HALF, softmax),
        Rule({"group": 32}, tile(64, 64, 32, 4, 3)),
        Rule({}, tile(32, 64, 64, 4, 2)),
    )


# rows: all of them; together: those that may share a tile; group: 0 without softmax
TABLE = Table(
    "fused_linear",
    shipped={
        "datacenter": rules(tile(128, 128, 64, 8, 3), tile(128, 128, 64, 8, 3)),
        "consumer": rules(tile(64, 128, 64, 4, 3), tile(128, 128, 64, 8, 3)),
        "sm_90": rules(tile(128, 128, 64, 8, 3), tile(128, 256, 64, 8, 4)),  # elsewhere it spills
    },
    candidates=(
        *(tile(m, 64, k, 4, s) for m in (32, 64) for k in (32, 64, 128) for s in (3, 4)),
        *(tile(*blocks, s) for blocks in ((128, 64, 64, 4), (64, 128, 64, 4), (128, 128, 64, 8)) for s in (3, 4)),
        tile(128, 256, 64, 8, 3),
        *(tile(*blocks, s) for blocks in ((64, 128, 128, 4), (128, 128, 128, 8)) for s in (3, 4)),
    ),
    scaling=("rows", "together"),
)


@triton.jit
def masked_softmax(scores, length, GROUP: tl.constexpr):
    """Softmax over the first ``length`` of each GROUP columns of (BLOCK_M, BLOCK_K), float32; 0 in the others."""
    split = tl.reshape(scores.to(tl.float32), (scores.shape[0], scores.shape[1] // GROUP, GROUP))
    seen = (tl.arange(0, GROUP) < length)[None, None, :]
    split = tl.where(seen, split, float("-inf"))
    largest = tl.where(length > 0, tl.max(split, axis=2), 0.0)
    weights = tl.where(seen, tl.exp2((split - largest[:, :, None]) * LOG2E), 0.0)
    total = tl.where(length > 0, tl.sum(weights, axis=2), 1.0)
    weights *= tl.div_rn(1.0, total)[:, :, None]
    return tl.reshape(weights, scores.shape)


@triton.jit
def fused_linear_kernel(
    x,  # (images, rows, inner)
    weight,  # (numbers, outer, inner)
    bias,  # (outer,) or (numbers, outer), or None
    moments,  # (images, rows, pieces, 2) float32; None: no LayerNorm
    colsum,  # (numbers, outer) float32: the sums are normalised; None: x is
    lengths,  # (images,) int64; None: no softmax
    residual,  # (images, rows, outer) or None
    x_scale,  # (images, rows) float32 with float8, else None
    weight_scale,  # (outer,) likewise
    out,  # (images, rows, outer)
    out_moments,  # (images, rows, ceil(outer / 64), 2) float32, or None
    rows,  # of an image; of all where it does not matter which image a row belongs to
    inner,
    outer,
    numbers,
    bias_step,  # from one image's bias to the next: outer or 0
    pieces,
    eps,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides inner
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outer, BLOCK_N)
    image = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    place = tl.program_id(0) % (tiles_m * tiles_n)
    above = place // (TOGETHER * tiles_n) * TOGETHER
    height = tl.minimum(tiles_m - above, TOGETHER)
    place %= TOGETHER * tiles_n
    first = place // height * BLOCK_N
    top = (above + place % height) * BLOCK_M
    live = top + tl.arange(0, BLOCK_M) < rows
    local = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - top)  # rows beyond the last repeat it, and are dropped
    n = first + tl.arange(0, BLOCK_N)
    inside = n < outer
    corner = image * rows + top  # offsets from here on need no 64 bits, which would take registers
    number = tl.minimum(image, numbers - 1)

    if moments is not None:
        mean, rstd = row_moments(moments + corner * pieces * 2 + local * pieces * 2, pieces, PIECE, inner, eps, PIECES)
    if lengths is not None:
        # the host does not look at lengths
        length = tl.minimum(tl.maximum(tl.load(lengths + image), 0), GROUP).to(tl.int32)

    kind = weight.dtype.element_ty
    x_at = x + corner * inner + local[:, None] * inner
    column = tl.minimum(tl.arange(0, BLOCK_N), outer - 1 - first)
    weight_at = weight + (number * outer + first) * inner + column[None, :] * inner
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            a = tl.load(x_at + k[None, :])
            b = tl.load(weight_at + k[:, None])
        else:
            a = tl.load(x_at + k[None, :], mask=(k < inner)[None, :], other=0.0)
            b = tl.load(weight_at + k[:, None], mask=(k < inner)[:, None], other=0.0)
        if lengths is not None:
            a = masked_softmax(a, length, GROUP)
        if moments is not None and colsum is None:
            a = (a.to(tl.float32) - mean[:, None]) * rstd[:, None]
        if x_scale is not None:
            y = tl.dot(a, b, y, max_num_imprecise_acc=BLOCK_K if BLOCK_K < EXACT_EVERY else EXACT_EVERY)
        else:
            y = tl.dot(a.to(kind), b, y, input_precision="tf32x3")

    if x_scale is not None:
        across = tl.load(weight_scale + n, mask=inside, other=0.0)
        y *= tl.load(x_scale + corner + local)[:, None] * across[None, :]
    if moments is not None and colsum is not None:
        sums = tl.load(colsum + number * outer + n, mask=inside, other=0.0)
        y = y * rstd[:, None] - (mean * rstd)[:, None] * sums[None, :]
    if bias is not None:
        y += tl.load(bias + number * bias_step + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION, out.dtype.element_ty == tl.float32)
    at = local[:, None] * outer + n[None, :]
    mask = live[:, None] & inside[None, :]
    if residual is not None:
        y += tl.load(residual + corner * outer + at, mask=mask, other=0.0).to(tl.float32)
    y = y.to(out.dtype.element_ty)
    tl.store(out + corner * outer + at, y, mask=mask)
    if out_moments is not None:  # of what was stored: LayerNorm sees the rounded values
        store_moments(out_moments, y, corner + local, live, first, outer)


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    moments: torch.Tensor | None = None,
    colsum: torch.Tensor | None = None,
    eps: float = 1e-6,
    lengths: torch.Tensor | None = None,
    group: int | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    emit_moments: bool = False,
    out_dtype: torch.dtype | None = None,
    x_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """act(f(x) W^T + bias) + residual (B, N, V), and its row moments if ``emit_moments``. One launch on the current
    device, more only to copy what is not contiguous, and to sum the weights of 16-bit types where ``colsum`` is
    missing. Float8 needs ``out_dtype``. Formula and checks: ``reference/fused_linear.py``, ``ops/fused_linear.py``.
    """
    (images, rows, inner), outer = x.shape, weight.shape[-2]
    numbers = weight.shape[0] if weight.dim() == 3 else 1
    out = torch.empty(images, rows, outer, dtype=out_dtype or weight.dtype, device=x.device)
    shape = (images, rows, triton.cdiv(outer, PIECE), 2)
    out_moments = torch.empty(shape, dtype=torch.float32, device=x.device) if emit_moments else None
    if out.numel():
        if numbers == 1 and lengths is None:  # rows of different images may share a tile
            images, rows = 1, images * rows
        if moments is not None and weight.dtype == torch.float32:
            colsum = None
        elif moments is not None and colsum is None:
            colsum = weight.sum(dim=-1, dtype=torch.float32)
        tensors = (x, weight, bias, moments, colsum, lengths, residual, x_scale, weight_scale)
        config = config or TABLE.pick(x.device, **sizes(images, rows, weight, group))
        blocks = _whole(config, group)
        tiles = triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(outer, blocks["BLOCK_N"])
        fused_linear_kernel[(images * tiles,)](
            *(None if t is None else t.contiguous() for t in tensors),
            out,
            out_moments,
            rows,
            inner,
            outer,
            numbers,
            outer if bias is not None and bias.dim() == 2 else 0,
            triton.cdiv(inner, PIECE),
            eps,
            **constants(inner, blocks["BLOCK_K"], group, activation),
            **blocks,
            **config.options,
        )
    return (out, out_moments) if emit_moments else out


def sizes(images: int, rows: int, weight: torch.Tensor, group: int | None) -> dict[str, int]:
    """What the table is asked for: ``images`` of ``rows`` that may share a tile."""
    *_, outer, inner = weight.shape
    return {
        "rows": images * rows,
        "together": rows,
        "width": outer,
        "inner": inner,
        "group": group or 0,
        "bytes": weight.element_size(),
    }


def _whole(config: Config, group: int | None) -> dict[str, int]:
    """The tile, made as deep as a group of the softmax, which must be whole in it."""
    return {**config.blocks, "BLOCK_K": max(config.blocks["BLOCK_K"], group or 0)}


def constants(inner: int, block_k: int, group: int | None, activation: str) -> dict[str, object]:
    return {
        "PIECES": triton.next_power_of_2(triton.cdiv(inner, PIECE)),
        "PIECE": PIECE,
        "GROUP": group,
        "ACTIVATION": activation,
        "EVEN": inner % block_k == 0,
    }


class Use(NamedTuple):
    """How the full-size model calls the op: sizes, and what it gives and asks for."""

    name: str
    outer: int
    inner: int
    normed: bool = False
    group: int | None = None
    texts: bool = False  # weights per image
    activation: str = "none"
    residual: bool = False
    emits: bool = False
    float_out: bool = False


SCORES = HEADS * GROUP
USES = (
    Use("qkv", 3 * WIDTH, WIDTH, normed=True, emits=True),
    Use("proj", WIDTH, WIDTH, residual=True),
    Use("cross", WIDTH, WIDTH, residual=True, emits=True),
    Use("fc1", HIDDEN, WIDTH, normed=True, activation="gelu"),
    Use("fc2", WIDTH, HIDDEN, residual=True, emits=True),
    Use("scores", SCORES, WIDTH, texts=True, float_out=True),
    Use("values", WIDTH, SCORES, group=GROUP, texts=True, residual=True, emits=True),
)
FLOAT8_USES = tuple(use._replace(normed=False) for use in USES if use.name in ("qkv", "fc1", "fc2"))
IMAGES = (2, 32)  # one image and sixteen with their unconditional rows


def cases() -> list[Case]:
    """The full-size model's layers at 512 px, one image and sixteen."""

    def case(use: Use, images: int, dtype: torch.dtype) -> Case:
        texts = (images // 2 + 1,) if use.texts else ()

        def prepare(device: torch.device):
            def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
                return (torch.randn(*shape, device=device) * scale).to(dtype)

            x = normal(images, 256, use.inner)
            weight = normal(*texts, use.outer, use.inner, scale=use.inner**-0.5)
            how = {"activation": use.activation, "emit_moments": use.emits}
            if use.normed:
                pieces = x.float().unflatten(2, (-1, PIECE))
                moments = (pieces.mean(dim=3), pieces.var(dim=3, correction=0) * PIECE)
                how |= {"moments": torch.stack(moments, dim=3), "colsum": weight.sum(dim=1, dtype=torch.float32)}
            if use.group:
                x = x.float()
                how |= {"group": use.group, "lengths": torch.full((images,), use.group, device=device)}
            if use.residual:
                how["residual"] = normal(images, 256, use.outer)
            if use.float_out:
                how["out_dtype"] = torch.float32
            bias = normal(use.outer)
            return lambda config: fused_linear(x, weight, bias, **how, config=config)

        return Case(f"{TYPES[dtype]} {use.name} {images}x256", TABLE, _sizes(use, images, 256, dtype), prepare)

    found = [case(use, images, dtype) for dtype in TYPES for images in IMAGES for use in USES]
    return found + [_float8_case(use, images) for images in IMAGES for use in FLOAT8_USES]


def _float8_case(use: Use, images: int) -> Case:
    def prepare(device: torch.device):
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device)

        x, weight = (normal(*shape).to(FLOAT8) for shape in ((images, 256, use.inner), (use.outer, use.inner)))
        scales = {"x_scale": normal(images, 256).abs(), "weight_scale": normal(use.outer).abs()}
        bias, how = normal(use.outer).bfloat16(), {"activation": use.activation, "emit_moments": use.emits}
        if use.residual:
            how["residual"] = normal(images, 256, use.outer).bfloat16()
        how |= {"out_dtype": torch.bfloat16, **scales}
        return lambda config: fused_linear(x, weight, bias, **how, config=config)

    return Case(f"fp8 {use.name} {images}x256", TABLE, _sizes(use, images, 256, FLOAT8), prepare, least=89)


def _sizes(use: Use, images: int, rows: int, dtype: torch.dtype) -> dict[str, int]:
    together = rows if use.texts else images * rows
    sizes = {"rows": images * rows, "together": together, "width": use.outer, "inner": use.inner}
    return {**sizes, "group": use.group or 0, "bytes": dtype.itemsize}


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The full-size model's layers as far as they compile to different code, with few rows and many; absorbed text at
    256 px too, where an image's rows fill no large tile, and the longest prompts that can be absorbed."""
    long = Use("values", 512, 1024, group=64, texts=True, residual=True, emits=True)  # of a narrower model
    distinct = [use for use in USES if use.name not in ("proj", "fc2")]
    shapes = [(use, images, 256) for use in (*distinct, long) for images in IMAGES]
    shapes += [(use, 32, 64) for use in USES if use.texts]
    found = [
        _variant(use, dtype, config)
        for dtype in TYPES
        for use, images, rows in shapes
        for config in TABLE.configs(capability, every, **_sizes(use, images, rows, dtype))
    ]
    if capability >= 89:  # below there is no instruction for the type
        found += [
            _variant(use, FLOAT8, config)
            for use in FLOAT8_USES
            for images in IMAGES
            for config in TABLE.configs(capability, every, **_sizes(use, images, 256, FLOAT8))
        ]
    return list({variant.label: variant for variant in found}.values())


def _variant(use: Use, dtype: torch.dtype, config: Config) -> Variant:
    scaled = dtype == FLOAT8  # and everything beside the product in bfloat16
    kind, folded = "bf16" if scaled else TYPES[dtype], use.normed and dtype != torch.float32
    config = config._replace(blocks=_whole(config, use.group))
    tensors = {"x": "fp32" if use.group else kind, "out": "fp32" if use.float_out else kind}
    tensors |= dict.fromkeys(("weight", "bias"), kind)
    if scaled:
        tensors |= dict.fromkeys(("x", "weight"), "fp8e4nv")
    optional = {
        "moments": ("fp32", use.normed),
        "colsum": ("fp32", folded),
        "lengths": ("i64", use.group is not None),
        "residual": (kind, use.residual),
        "x_scale": ("fp32", scaled),
        "weight_scale": ("fp32", scaled),
        "out_moments": ("fp32", use.emits),
    }
    tensors |= {name: of for name, (of, there) in optional.items() if there}
    integers = ("rows", "inner", "outer", "numbers", "bias_step", "pieces")
    return Variant(
        name="fused_linear",
        dtype="fp8" if scaled else kind,
        shape=f"{use.name} {use.inner}->{use.outer}",
        config=config,
        kernel=fused_linear_kernel,
        signature={name: f"*{of}" for name, of in tensors.items()} | dict.fromkeys(integers, "i32") | {"eps": "fp32"},
        constexprs={name: None for name, (_, there) in optional.items() if not there}
        | constants(use.inner, config.blocks["BLOCK_K"], use.group, use.activation),
        multiples_of_16=("rows", "inner", "outer", "bias_step"),
        tensor_cores=True,
    )
