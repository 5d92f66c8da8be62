"""Bias, activation and residual behind a convolution in one pass, for either memory format."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels._activation import activate
from dcar_fast.kernels._layout import channels_last, empty_image, pixels
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant


def tile(pixels: int, channels: int, num_warps: int) -> Config:
    return Config({"BLOCK_PIXELS": pixels, "BLOCK_CHANNELS": channels}, num_warps)


# 16 elements a thread: two 16-byte vectors of each 16-bit input are on their way at once. They lie along the channels
# in channels_last images, along the pixels in contiguous ones.
RULES = (
    Rule({"channels_last": 0, "pixels": 64}, tile(64, 32, 4)),
    Rule({"channels_last": 0, "pixels": 256}, tile(256, 8, 4)),
    Rule({"channels_last": 0}, tile(1024, 2, 4)),
    Rule({"channels": 64}, tile(32, 64, 4)),
    Rule({"channels": 128}, tile(16, 128, 4)),
    Rule({}, tile(8, 256, 4)),
)
TABLE = Table(
    "bias_residual",
    shipped={"datacenter": RULES, "consumer": RULES},
    candidates=(
        *(tile(pixels, 256, warps) for pixels in (4, 8, 16, 32) for warps in (4, 8)),
        *(tile(pixels, 512, 4) for pixels in (2, 4, 8)),
        *(tile(pixels, 128, 4) for pixels in (8, 32)),
        *(tile(1024, channels, 4) for channels in (1, 2, 4)),
    ),
    scaling=("pixels",),
)
FULL_SIZE = ((1024, 16), (512, 128), (256, 256))  # channels and side of the decoder at 512 px
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def bias_residual_kernel(
    x,  # (B, C, N) with strides, N pixels
    bias,  # (C,)
    residual,  # (B, C, N) with strides, not read unless HAS_RESIDUAL
    out,  # (B, C, N) with strides
    pixels,
    channels,
    x_image,
    x_channel,
    x_pixel,
    residual_image,
    residual_channel,
    residual_pixel,
    out_image,
    out_channel,
    out_pixel,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    across, down = tl.cdiv(channels, BLOCK_CHANNELS), tl.cdiv(pixels, BLOCK_PIXELS)
    place = tl.program_id(0) // across
    image = (place // down).to(tl.int64)
    pixel = (place % down * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)).to(tl.int64)[:, None]
    channel = (tl.program_id(0) % across * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)).to(tl.int64)[None, :]
    inside = (pixel < pixels) & (channel < channels)

    values = tl.load(x + image * x_image + channel * x_channel + pixel * x_pixel, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual += image * residual_image + channel * residual_channel + pixel * residual_pixel
        added = tl.load(residual, mask=inside, other=0.0)
    shift = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    result = activate(values.to(tl.float32) + shift, ACTIVATION, out.dtype.element_ty == tl.float32)
    if HAS_RESIDUAL:
        result += added.to(tl.float32)
    out += image * out_image + channel * out_channel + pixel * out_pixel
    tl.store(out, result.to(out.dtype.element_ty), mask=inside)


def bias_residual(
    x: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    activation: str,
    config: Config | None = None,
) -> torch.Tensor:
    """residual + act(x + bias) with x and residual (B, C, H, W), bias (C,), in the memory format of x. One launch on
    the current device; sums in float32. Formula, checks: ``reference/bias_residual.py``, ``ops/bias_residual.py``.

    Strides are respected; an image whose rows do not follow one another evenly, such as a cutout, is copied first.
    """
    out = empty_image(x, *x.shape[1:])
    if out.numel() == 0:
        return out
    last = channels_last(x)
    x, flat, has_residual = pixels(x), out.flatten(2), residual is not None
    batch, channels, count = x.shape
    residual = pixels(residual) if has_residual else x
    config = config or TABLE.pick(x.device, channels=channels, pixels=count, channels_last=last)
    down, across = (
        triton.cdiv(size, config.blocks[f"BLOCK_{name}"]) for size, name in ((count, "PIXELS"), (channels, "CHANNELS"))
    )
    bias_residual_kernel[(batch * down * across,)](
        x,
        bias.contiguous(),
        residual,
        flat,
        count,
        channels,
        *x.stride(),
        *residual.stride(),
        *flat.stride(),
        ACTIVATION=activation,
        HAS_RESIDUAL=has_residual,
        **config.launch,
    )
    return out


def cases() -> list[Case]:
    """Behind the decoder's first convolution and those that end its residual blocks, at 512 px, channels_last."""

    def case(batch: int, channels: int, side: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            x, residual = (
                torch.randn(batch, side, side, channels, device=device).to(dtype).permute(0, 3, 1, 2) for _ in range(2)
            )
            bias = torch.randn(channels, device=device).to(dtype)
            return lambda config: bias_residual(x, bias, residual, "none", config)

        sizes = {"channels": channels, "pixels": side * side, "channels_last": 1}
        return Case(f"{DTYPES[dtype]} {batch}x{channels}x{side}x{side}", TABLE, sizes, prepare)

    return [
        case(batch, channels, side, dtype)
        for batch in (1, 16)
        for channels, side in FULL_SIZE
        for dtype in (torch.float32, torch.bfloat16)
    ]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The decoder's in either memory format, and those with an activation."""
    strides = [f"{name}_{axis}" for name in ("x", "residual", "out") for axis in ("image", "channel", "pixel")]

    def variant(channels: int, side: int, last: bool, dtype: str, activation: str, config: Config) -> Variant:
        unit = [name for name in strides if name.endswith("_channel" if last else "_pixel")]
        sizes = dict.fromkeys(["pixels", "channels", *(name for name in strides if name not in unit)], "i32")
        return Variant(
            name="bias_residual",
            dtype=dtype,
            shape=f"{channels}x{side}x{side} {activation} {'channels_last' if last else 'contiguous'}",
            config=config,
            kernel=bias_residual_kernel,
            signature=dict.fromkeys(("x", "bias", "residual", "out"), f"*{dtype}") | sizes,
            constexprs=dict.fromkeys(unit, 1) | {"ACTIVATION": activation, "HAS_RESIDUAL": activation != "relu"},
            multiples_of_16=tuple(sizes),
        )

    shapes = [*((channels, side, "none") for channels, side in FULL_SIZE), (128, 8, "relu"), (64, 8, "silu")]
    return [
        variant(channels, side, last, dtype, activation, config)
        for last in (True, False)
        for channels, side, activation in shapes
        for dtype in DTYPES.values()
        for config in TABLE.configs(capability, every, channels=channels, pixels=side * side, channels_last=last)
    ]
