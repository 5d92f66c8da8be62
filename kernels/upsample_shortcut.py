"""Pixel shuffle of a convolution's output plus that of its duplicated input, in one pass, for either memory format."""

import math

import torch
import triton
import triton.language as tl

from dcar_fast.kernels._layout import channels_last, empty_image, pixels
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant


def tile(pixels: int, channels: int, num_warps: int) -> Config:
    return Config({"BLOCK_PIXELS": pixels, "BLOCK_CHANNELS": channels}, num_warps)


# channels_last: input pixels x output channels, four input channels for each. Contiguous: input pixels x output rows,
# two for each output channel.
LAST_RULES = (Rule({"channels": 64}, tile(16, 64, 4)), Rule({}, tile(8, 128, 4)))
LAST_TABLE = Table(
    "upsample_shortcut.channels_last",
    shipped={"datacenter": LAST_RULES, "consumer": LAST_RULES},
    candidates=tuple(tile(p, c, w) for p, c in ((4, 128), (8, 128), (4, 256), (16, 64)) for w in (4, 8)),
)
CONTIGUOUS_RULES = (Rule({"pixels": 256}, tile(256, 4, 4)), Rule({}, tile(512, 4, 4)))
CONTIGUOUS_TABLE = Table(
    "upsample_shortcut.contiguous",
    shipped={"datacenter": CONTIGUOUS_RULES, "consumer": CONTIGUOUS_RULES},
    candidates=tuple(tile(p, c, w) for p, c in ((256, 4), (512, 2), (512, 4), (1024, 2)) for w in (4, 8)),
    scaling=("pixels",),
)
FULL_SIZE = ((1024, 1024, 16), (1024, 512, 32), (512, 512, 64), (512, 256, 128))  # channels in and out, side
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def channels_last_kernel(
    y,  # (B, 4C, H*W) with strides
    x,  # (B, 4C / repeats, H*W) with strides
    out,  # (B, C, 2H, 2W), channels_last
    pixels,  # H*W
    width,  # W
    channels,  # C
    y_image,
    y_channel,
    y_pixel,
    x_image,
    x_channel,
    x_pixel,
    share,  # repeats / COPIES
    COPIES: tl.constexpr,  # gcd of repeats and 4: so many neighbours among y's channels get the same one of x
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    place = (tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS))[:, None]
    live = place < pixels
    pixel = place.to(tl.int64)
    first = tl.program_id(1) * BLOCK_CHANNELS

    # x's share first: as few loads as it has channels here, then spread over the neighbours
    SOURCES: tl.constexpr = 4 * BLOCK_CHANNELS // COPIES
    source = 4 * first // COPIES + tl.arange(0, SOURCES)[None, :]
    inside = live & (source < 4 // COPIES * channels)
    channel = (source // share).to(tl.int64)
    shortcut = tl.load(x + image * x_image + channel * x_channel + pixel * x_pixel, mask=inside, other=0.0)
    shortcut = tl.broadcast_to(shortcut.to(tl.float32)[:, :, None], (BLOCK_PIXELS, SOURCES, COPIES))

    channel = (4 * first + tl.arange(0, 4 * BLOCK_CHANNELS)).to(tl.int64)[None, :]
    inside = live & (channel < 4 * channels)
    values = tl.load(y + image * y_image + channel * y_channel + pixel * y_pixel, mask=inside, other=0.0)
    values = values.to(tl.float32) + tl.reshape(shortcut, (BLOCK_PIXELS, 4 * BLOCK_CHANNELS))

    # channel 4c + 2i + j goes to channel c of the pixel at (2h + i, 2w + j)
    values = tl.permute(tl.reshape(values, (BLOCK_PIXELS, BLOCK_CHANNELS, 4)), (0, 2, 1)).to(out.dtype.element_ty)
    corner = (2 * place - place % width) * 2  # 2h * 2W + 2w, with place = h * W + w
    corner = image * 4 * pixels + corner.to(tl.int64)
    offset = tl.arange(0, 4)[None, :]
    target = corner + offset // 2 * 2 * width + offset % 2  # (BLOCK_PIXELS, 4)
    channel = (first + tl.arange(0, BLOCK_CHANNELS))[None, None, :]
    inside = live[:, :, None] & (channel < channels)
    tl.store(out + target[:, :, None] * channels + channel, values, mask=inside)


@triton.jit
def contiguous_kernel(
    y,  # (B, 4C, H*W) with strides
    x,  # (B, 4C / repeats, H*W) with strides
    out,  # (B, C, 2H, 2W), contiguous
    pixels,  # H*W
    width,  # W
    channels,  # C
    y_image,
    y_channel,
    y_pixel,
    x_image,
    x_channel,
    x_pixel,
    share,  # repeats / COPIES
    COPIES: tl.constexpr,  # gcd of repeats and 4: so many neighbours among y's channels get the same one of x
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_PIXELS
    pixel = (start + tl.arange(0, BLOCK_PIXELS)).to(tl.int64)[None, :]
    # row 2c + i of the channels' upper and lower halves is made of channels 2 row (left) and 2 row + 1 (right)
    row = (tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(tl.int64)[:, None]
    inside = (row < 2 * channels) & (pixel < pixels)
    y += image * y_image + 2 * row * y_channel + pixel * y_pixel
    left = tl.load(y, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(y + y_channel, mask=inside, other=0.0).to(tl.float32)

    x += image * x_image + pixel * x_pixel
    shortcut = tl.load(x + 2 * row // (COPIES * share) * x_channel, mask=inside, other=0.0).to(tl.float32)
    left += shortcut
    if COPIES == 1:
        shortcut = tl.load(x + (2 * row + 1) // share * x_channel, mask=inside, other=0.0).to(tl.float32)
    right += shortcut

    values = tl.reshape(tl.join(left, right), (BLOCK_CHANNELS, 2 * BLOCK_PIXELS)).to(out.dtype.element_ty)
    column = 2 * start + tl.arange(0, 2 * BLOCK_PIXELS)[None, :]  # 2 * pixel, and the one right of it
    place = (column // (2 * width)).to(tl.int64) * 2 * width + column  # rows of the pair in turn
    place += (image * channels + row // 2) * 4 * pixels + row % 2 * 2 * width
    inside = (row < 2 * channels) & (column < 2 * pixels)
    tl.store(out + place, values, mask=inside)


def upsample_shortcut(y: torch.Tensor, x: torch.Tensor, config: Config | None = None) -> torch.Tensor:
    """(B, C', 2H, 2W) from y (B, 4C', H, W) and x (B, Cin, H, W), in the memory format of y. One launch on the current
    device. Formula and checks: ``reference/upsample_shortcut.py``, ``ops/upsample_shortcut.py``.

    Strides are respected; an image whose rows do not follow one another evenly, such as a cutout, is copied first.
    H*W must be below 2^29.
    """
    batch, inner, height, width = y.shape
    out = empty_image(y, inner // 4, 2 * height, 2 * width)
    if out.numel() == 0:
        return out
    last, channels, repeats = channels_last(y), inner // 4, inner // x.shape[1]
    copies = math.gcd(repeats, 4)
    if last:
        config = config or LAST_TABLE.pick(y.device, channels=channels)
        kernel, rows = channels_last_kernel, channels
    else:
        config = config or CONTIGUOUS_TABLE.pick(y.device, pixels=height * width)
        kernel, rows = contiguous_kernel, 2 * channels
    y, x = pixels(y), pixels(x)
    tiles = triton.cdiv(height * width, config.blocks["BLOCK_PIXELS"])
    kernel[(batch * tiles, triton.cdiv(rows, config.blocks["BLOCK_CHANNELS"]))](
        y,
        x,
        out,
        height * width,
        width,
        channels,
        *y.stride(),
        *x.stride(),
        repeats // copies,
        COPIES=copies,
        **config.launch,
    )
    return out


def cases() -> list[Case]:
    """The decoder's four upsamplings at 512 px, channels_last."""

    def case(batch: int, inputs: int, channels: int, side: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            def image(depth: int):
                return torch.randn(batch, side, side, depth, device=device).to(dtype).permute(0, 3, 1, 2)

            y, x = image(4 * channels), image(inputs)
            return lambda config: upsample_shortcut(y, x, config)

        label = f"{DTYPES[dtype]} {batch}x{inputs}x{side}x{side} to {channels}"
        return Case(label, LAST_TABLE, {"channels": channels}, prepare)

    return [
        case(batch, inputs, channels, side, dtype)
        for batch in (1, 16)
        for inputs, channels, side in FULL_SIZE
        for dtype in (torch.float32, torch.bfloat16)
    ]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The decoder's upsamplings in either memory format: x's channels are repeated four times or twice."""
    strides = [f"{name}_{axis}" for name in ("y", "x") for axis in ("image", "channel", "pixel")]

    def variant(last: bool, repeats: int, dtype: str, config: Config) -> Variant:
        unit = [name for name in strides if name.endswith("_channel" if last else "_pixel")]
        sizes = ["pixels", "width", "channels", *(name for name in strides if name not in unit)]
        return Variant(
            name=f"upsample_shortcut.{'channels_last' if last else 'contiguous'}",
            dtype=dtype,
            shape=f"x{repeats}",
            config=config,
            kernel=channels_last_kernel if last else contiguous_kernel,
            signature=dict.fromkeys(("y", "x", "out"), f"*{dtype}") | dict.fromkeys(sizes, "i32"),
            constexprs=dict.fromkeys(unit, 1) | {"share": 1, "COPIES": repeats},
            multiples_of_16=tuple(sizes),
        )

    tables = {True: (LAST_TABLE, {"channels": 1024}), False: (CONTIGUOUS_TABLE, {"pixels": 4096})}
    return [
        variant(last, repeats, dtype, config)
        for last, (table, sizes) in tables.items()
        for repeats in (4, 2)
        for dtype in DTYPES.values()
        for config in table.configs(capability, every, **sizes)
    ]
