"""ReLU linear attention in two launches: the sums over all pixels, then every pixel's output. Float32 sums throughout.

A sum over more than ``CHUNK`` pixels is split among at most ``SPLITS`` blocks, whose parts the second launch adds up
in order: no atomics, the same result every time, whatever the batch. Up to 32 pixels take one launch, which forms the
attention weights.
"""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels._layout import empty_image, pixels
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant

HEAD_DIM = 32
CHUNK, SPLITS = 512, 8
EPS = tl.constexpr(1e-15)
DIM = tl.constexpr(HEAD_DIM)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def tile(pixels: int, num_warps: int, num_stages: int = 2) -> Config:
    return Config({"BLOCK_PIXELS": pixels}, num_warps, num_stages)


# float32 products run on the FMA units, whose tiles live in registers
STATE_RULES = (Rule({"bytes": 2}, tile(64, 4, 3)), Rule({}, tile(16, 4)))
STATE = Table(
    "relu_linear_attention.state",
    shipped={"datacenter": STATE_RULES, "consumer": STATE_RULES},
    candidates=tuple(tile(block, warps, stages) for block in (16, 64, 128) for warps in (2, 4) for stages in (2, 3)),
    scaling=("pixels",),
)
APPLY_RULES = (Rule({}, tile(64, 4)),)
APPLY = Table(
    "relu_linear_attention.apply",
    shipped={"datacenter": APPLY_RULES, "consumer": APPLY_RULES},
    candidates=tuple(tile(block, warps) for block in (32, 64, 128) for warps in (2, 4)),
    scaling=("pixels",),
)
SMALL_RULES = (Rule({}, tile(HEAD_DIM, 4)),)
SMALL = Table(
    "relu_linear_attention.small",
    shipped={"datacenter": SMALL_RULES, "consumer": SMALL_RULES},
    candidates=tuple(tile(HEAD_DIM, warps) for warps in (1, 2, 4)),
    scaling=("pixels",),
)


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x).to(x.dtype)  # a maximum may drop NaN


@triton.jit
def state_kernel(
    qkv,  # (B, 3C, N) with strides, N pixels
    states,  # (B, heads, splits, 33, 32) float32: sums of v k^T, and of k in the last row
    pixels,
    heads,
    chunk,  # pixels per split
    image_stride,
    channel_stride,
    pixel_stride,
    BLOCK_PIXELS: tl.constexpr,
):
    splits = tl.cdiv(pixels, chunk)
    row = tl.program_id(0) // splits
    first = tl.program_id(0) % splits * chunk
    dim = tl.arange(0, DIM).to(tl.int64)
    key = (row % heads * 3 + 1) * DIM + dim
    qkv += (row // heads).to(tl.int64) * image_stride
    state = tl.zeros((DIM, DIM), tl.float32)
    total = tl.zeros((DIM,), tl.float32)
    last = tl.minimum(first + chunk, pixels)
    for start in range(first, last, BLOCK_PIXELS):
        pixel = (start + tl.arange(0, BLOCK_PIXELS)).to(tl.int64)
        k = qkv + key[None, :] * channel_stride + pixel[:, None] * pixel_stride
        v = qkv + (key + DIM)[:, None] * channel_stride + pixel[None, :] * pixel_stride
        k = relu(tl.load(k, mask=pixel[:, None] < last, other=0.0))  # (BLOCK_PIXELS, 32)
        v = tl.load(v, mask=pixel[None, :] < last, other=0.0)  # (32, BLOCK_PIXELS)
        state = tl.dot(v, k, state, input_precision="ieee")  # products of 16-bit values are exact
        total += tl.sum(k.to(tl.float32), axis=0)
    states += tl.program_id(0).to(tl.int64) * (DIM + 1) * DIM
    tl.store(states + dim[:, None] * DIM + dim[None, :], state)
    tl.store(states + DIM * DIM + dim, total)


@triton.jit
def apply_kernel(
    qkv,  # (B, 3C, N) with strides, N pixels
    states,  # (B, heads, splits, 33, 32) float32
    out,  # (B, C, N) with strides
    pixels,
    heads,
    splits,
    image_stride,
    channel_stride,
    pixel_stride,
    out_image,
    out_channel,
    out_pixel,
    BLOCK_PIXELS: tl.constexpr,
):
    # a 16-bit query is exact in TF32; three products with the parts of the state leave float32's precision
    PRECISION: tl.constexpr = "ieee" if qkv.dtype.element_ty == tl.float32 else "tf32x3"
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    row = tl.program_id(0) // tiles
    image, head = (row // heads).to(tl.int64), row % heads
    dim = tl.arange(0, DIM).to(tl.int64)
    pixel = (tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)).to(tl.int64)
    live = pixel[:, None] < pixels
    query = (head * 3 * DIM + dim)[None, :] * channel_stride + pixel[:, None] * pixel_stride
    q = relu(tl.load(qkv + image * image_stride + query, mask=live, other=0.0)).to(tl.float32)  # (BLOCK_PIXELS, 32)

    states += row.to(tl.int64) * splits * (DIM + 1) * DIM
    state = tl.zeros((DIM, DIM), tl.float32)  # keys first
    total = tl.zeros((DIM,), tl.float32)
    for _ in range(0, splits):
        state += tl.load(states + dim[None, :] * DIM + dim[:, None])
        total += tl.load(states + DIM * DIM + dim)
        states += (DIM + 1) * DIM
    weight = tl.sum(q * total[None, :], axis=1)
    result = tl.dot(q, state, input_precision=PRECISION) / (weight + EPS)[:, None]
    out += image * out_image + (head * DIM + dim)[None, :] * out_channel + pixel[:, None] * out_pixel
    tl.store(out, result.to(out.dtype.element_ty), mask=live)


@triton.jit
def small_kernel(
    qkv,  # (B, 3C, N) with strides, N <= BLOCK_PIXELS pixels
    out,  # (B, C, N) with strides
    pixels,
    heads,
    image_stride,
    channel_stride,
    pixel_stride,
    out_image,
    out_channel,
    out_pixel,
    BLOCK_PIXELS: tl.constexpr,
):
    PRECISION: tl.constexpr = "ieee" if qkv.dtype.element_ty == tl.float32 else "tf32x3"
    image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    dim = tl.arange(0, DIM).to(tl.int64)
    pixel = tl.arange(0, BLOCK_PIXELS).to(tl.int64)
    live = pixel < pixels
    qkv += image * image_stride + head * 3 * DIM * channel_stride
    by_pixel = pixel[:, None] * pixel_stride + dim[None, :] * channel_stride
    q = relu(tl.load(qkv + by_pixel, mask=live[:, None], other=0.0))
    qkv += DIM * channel_stride
    k = dim[:, None] * channel_stride + pixel[None, :] * pixel_stride
    k = relu(tl.load(qkv + k, mask=live[None, :], other=0.0))
    v = tl.load(qkv + DIM * channel_stride + by_pixel, mask=live[:, None], other=0.0).to(tl.float32)
    weights = tl.dot(q, k, input_precision="ieee")  # (queries, keys)
    weights = weights / (tl.sum(weights, axis=1) + EPS)[:, None]
    result = tl.dot(weights, v, input_precision=PRECISION)
    out += image * out_image + pixel[:, None] * out_pixel + (head * DIM + dim)[None, :] * out_channel
    tl.store(out, result.to(out.dtype.element_ty), mask=live[:, None])


def relu_linear_attention(
    qkv: torch.Tensor, state_config: Config | None = None, config: Config | None = None
) -> torch.Tensor:
    """(B, C, H, W) in the memory format of qkv (B, 3C, H, W). Two launches on the current device, one for up to 32
    pixels: ``state_config`` is for the first of two, ``config`` for the last. Formula and checks:
    ``reference/relu_linear_attention.py``, ``ops/relu_linear_attention.py``.

    Strides are respected; an image whose rows do not follow one another evenly, such as a cutout, is copied first.
    """
    batch, inner, height, width = qkv.shape
    heads, size = inner // (3 * HEAD_DIM), height * width
    out = empty_image(qkv, inner // 3, height, width)
    if out.numel() == 0:
        return out
    sizes = {"pixels": size, "bytes": qkv.element_size()}
    qkv, flat = pixels(qkv), out.flatten(2)
    if size <= HEAD_DIM:
        config = config or SMALL.pick(qkv.device, **sizes)
        small_kernel[(batch * heads,)](qkv, flat, size, heads, *qkv.stride(), *flat.stride(), **config.launch)
        return out
    chunk = max(CHUNK, triton.cdiv(size, SPLITS * 64) * 64)
    splits = triton.cdiv(size, chunk)
    states = torch.empty(batch, heads, splits, HEAD_DIM + 1, HEAD_DIM, dtype=torch.float32, device=qkv.device)
    state_config = state_config or STATE.pick(qkv.device, **sizes)
    state_kernel[(batch * heads * splits,)](qkv, states, size, heads, chunk, *qkv.stride(), **state_config.launch)
    config = config or APPLY.pick(qkv.device, **sizes)
    apply_kernel[(batch * heads * triton.cdiv(size, config.blocks["BLOCK_PIXELS"]),)](
        qkv, states, flat, size, heads, splits, *qkv.stride(), *flat.stride(), **config.launch
    )
    return out


def cases() -> list[Case]:
    """The decoder's three EfficientViT stages at 512 px, channels_last, for either launch."""

    def case(batch: int, channels: int, side: int, dtype: torch.dtype, table: Table) -> Case:
        def prepare(device: torch.device):
            qkv = torch.randn(batch, side, side, 3 * channels, device=device).to(dtype).permute(0, 3, 1, 2)
            if table is STATE:
                return lambda config: relu_linear_attention(qkv, state_config=config)
            return lambda config: relu_linear_attention(qkv, config=config)

        label = f"{DTYPES[dtype]} {batch}x{3 * channels}x{side}x{side}"
        return Case(label, table, {"pixels": side * side, "bytes": dtype.itemsize}, prepare)

    return [
        case(batch, channels, side, dtype, table)
        for batch in (1, 16)
        for channels, side in ((1024, 16), (1024, 32), (512, 64))
        for dtype in (torch.float32, torch.bfloat16)
        for table in (STATE, APPLY)
    ]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """All launches in either memory format."""
    tables = {state_kernel: STATE, apply_kernel: APPLY, small_kernel: SMALL}

    def variant(kernel, last: bool, dtype: str, config: Config) -> Variant:
        names = kernel.arg_names
        unit = [name for name in ("channel_stride", "out_channel") if last] or ["pixel_stride", "out_pixel"]
        pointers = {name: f"*{dtype}" for name in ("qkv", "out") if name in names}
        if "states" in names:
            pointers["states"] = "*fp32"
        sizes = [name for name in names if name not in {*pointers, *unit, "BLOCK_PIXELS"}]
        return Variant(
            name=tables[kernel].name,
            dtype=dtype,
            shape="channels_last" if last else "contiguous",
            config=config,
            kernel=kernel,
            signature=pointers | dict.fromkeys(sizes, "i32"),
            constexprs={name: 1 for name in unit if name in names},
            multiples_of_16=tuple(name for name in sizes if name not in ("heads", "splits")),
            tensor_cores=dtype != "fp32",  # TF32 would cost a float32 image its precision
        )

    return [
        variant(kernel, last, dtype, config)
        for kernel, table in tables.items()
        for last in (True, False)
        for dtype in DTYPES.values()
        for config in table.configs(capability, every, pixels=4096, bytes=4 if dtype == "fp32" else 2)
    ]
