"""LayerNorm or RMSNorm over the channels of each pixel, activation and residual in one pass, either memory format."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels._activation import activate
from dcar_fast.kernels._layout import channels_last, empty_image, pixels
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant


def tile(pixels: int, channels: int, num_warps: int) -> Config:
    return Config({"BLOCK_PIXELS": pixels, "BLOCK_CHANNELS": channels}, num_warps)


# A tile that holds all channels reads its input once; more channels are walked over three times. channels_last has
# whole pixels in a row of memory: few pixels per tile are enough, and as many threads as there are 16-byte vectors of
# 16-bit channels spare the tile a change of layout. Contiguous images have runs of pixels: at least 32 bytes each.
CONTIGUOUS = (
    Rule({"channels_last": 0, "channels": 32}, tile(128, 32, 4)),
    Rule({"channels_last": 0, "channels": 128}, tile(64, 128, 8)),
    Rule({"channels_last": 0, "channels": 256}, tile(32, 256, 8)),
    Rule({"channels_last": 0, "channels": 512}, tile(32, 512, 16)),
    Rule({"channels_last": 0, "channels": 1024}, tile(16, 1024, 16)),
    Rule({"channels_last": 0}, tile(32, 256, 8)),
)
CHANNELS_LAST = (
    Rule({"channels": 32}, tile(32, 32, 1)),
    Rule({"channels": 128}, tile(8, 128, 1)),
    Rule({"channels": 256}, tile(4, 256, 1)),
    Rule({"channels": 512}, tile(4, 512, 2)),
    Rule({}, tile(2, 1024, 4)),
)
TABLE = Table(
    "channel_norm",
    shipped={"datacenter": CONTIGUOUS + CHANNELS_LAST, "consumer": CONTIGUOUS + CHANNELS_LAST},
    candidates=(
        *(tile(pixels, 256, 1) for pixels in (2, 4, 8)),
        *(tile(pixels, 256, 4) for pixels in (8, 16)),
        *(tile(pixels, 512, 2) for pixels in (1, 2, 4)),
        *(tile(pixels, 1024, 4) for pixels in (1, 2, 4)),
        *(tile(pixels, 1024, 16) for pixels in (8, 16)),
    ),
)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def load_tile(x, stride, live, start, channels, BLOCK_CHANNELS: tl.constexpr):
    """Float32 values of the channels from ``start``, zero outside; and which of them there are."""
    channel = (start + tl.arange(0, BLOCK_CHANNELS)).to(tl.int64)[None, :]
    inside = channel < channels
    return tl.load(x + channel * stride, mask=live & inside, other=0.0).to(tl.float32), channel, inside


@triton.jit
def channel_norm_kernel(
    x,  # (B, C, N) with strides, N pixels
    residual,  # (B, C, N) with strides, not read unless HAS_RESIDUAL
    weight,  # (C,)
    bias,  # (C,)
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
    eps,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CENTRED: tl.constexpr,  # LayerNorm, else RMSNorm
    WHOLE: tl.constexpr,  # the tile holds all channels
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(pixels, BLOCK_PIXELS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)).to(tl.int64)[:, None]
    live = pixel < pixels
    x += image * x_image + pixel * x_pixel
    residual += image * residual_image + pixel * residual_pixel
    out += image * out_image + pixel * out_pixel

    # the variance from centred values: E[x^2] - mean^2 would lose everything where |mean| >> std
    mean = tl.zeros((BLOCK_PIXELS, 1), tl.float32)
    if WHOLE:
        values, channel, inside = load_tile(x, x_channel, live, 0, channels, BLOCK_CHANNELS)
        if CENTRED:
            mean = (tl.sum(values, axis=1) / channels)[:, None]
        centred = tl.where(inside, values - mean, 0.0)
        square = tl.sum(centred * centred, axis=1)
    else:
        if CENTRED:
            total = tl.zeros((BLOCK_PIXELS,), tl.float32)
            for start in range(0, channels, BLOCK_CHANNELS):
                values, channel, inside = load_tile(x, x_channel, live, start, channels, BLOCK_CHANNELS)
                total += tl.sum(values, axis=1)
            mean = (total / channels)[:, None]
        square = tl.zeros((BLOCK_PIXELS,), tl.float32)
        for start in range(0, channels, BLOCK_CHANNELS):
            values, channel, inside = load_tile(x, x_channel, live, start, channels, BLOCK_CHANNELS)
            centred = tl.where(inside, values - mean, 0.0)
            square += tl.sum(centred * centred, axis=1)
    deviation = tl.sqrt_rn(square / channels + eps)
    scale = tl.div_rn(tl.full((BLOCK_PIXELS,), 1.0, tl.float32), deviation)[:, None]

    for start in range(0, BLOCK_CHANNELS if WHOLE else channels, BLOCK_CHANNELS):
        if not WHOLE:
            values, channel, inside = load_tile(x, x_channel, live, start, channels, BLOCK_CHANNELS)
        gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        result = activate((values - mean) * scale * gain + shift, ACTIVATION, out.dtype.element_ty == tl.float32)
        if HAS_RESIDUAL:
            result += tl.load(residual + channel * residual_channel, mask=live & inside, other=0.0).to(tl.float32)
        tl.store(out + channel * out_channel, result.to(out.dtype.element_ty), mask=live & inside)


def channel_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    activation: str,
    eps: float,
    centred: bool = True,
    config: Config | None = None,
) -> torch.Tensor:
    """residual + act(norm(x)) with x and residual (B, C, H, W), in the memory format of x. One launch on the
    current device; statistics in float32. Formula and checks: ``reference/channel_norm.py``, ``ops/channel_norm.py``.

    Strides are respected; an image whose rows do not follow one another evenly, such as a cutout, is copied first.
    """
    out = empty_image(x, *x.shape[1:])
    if out.numel() == 0:
        return out
    batch, channels, _, _ = x.shape
    config = config or TABLE.pick(x.device, channels=channels, channels_last=channels_last(x))
    has_residual = residual is not None
    x, flat = pixels(x), out.flatten(2)
    residual = pixels(residual) if has_residual else x
    channel_norm_kernel[(batch * triton.cdiv(x.shape[2], config.blocks["BLOCK_PIXELS"]),)](
        x,
        residual,
        weight.contiguous(),
        bias.contiguous(),
        flat,
        x.shape[2],
        channels,
        *x.stride(),
        *residual.stride(),
        *flat.stride(),
        eps,
        ACTIVATION=activation,
        HAS_RESIDUAL=has_residual,
        CENTRED=centred,
        WHOLE=channels <= config.blocks["BLOCK_CHANNELS"],
        **config.launch,
    )
    return out


def cases() -> list[Case]:
    """The decoder's norms at 512 px, channels_last: behind attention and MLP in stages 5 to 3, and at the output."""

    def case(batch: int, channels: int, side: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            def image():
                return torch.randn(batch, side, side, channels, device=device).to(dtype).permute(0, 3, 1, 2)

            weight, bias = torch.randn(2, channels, device=device).to(dtype)
            last = side == 256  # the output norm: no residual, then ReLU
            x, residual, activation = image(), None if last else image(), "relu" if last else "none"
            return lambda config: channel_norm(x, weight, bias, residual, activation, 1e-5, True, config)

        sizes = {"channels": channels, "channels_last": 1}
        return Case(f"{DTYPES[dtype]} {batch}x{channels}x{side}x{side}", TABLE, sizes, prepare)

    return [
        case(batch, channels, side, dtype)
        for batch in (1, 16)
        for channels, side in ((1024, 16), (1024, 32), (512, 64), (256, 256))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The decoder's norms in either memory format, one that is wider than a tile, and RMSNorm."""
    strides = [f"{name}_{axis}" for name in ("x", "residual", "out") for axis in ("image", "channel", "pixel")]

    def variant(channels: int, last: bool, dtype: str, activation: str, centred: bool, config: Config) -> Variant:
        unit = [name for name in strides if name.endswith("_channel" if last else "_pixel")]
        sizes = dict.fromkeys(["pixels", "channels", *(name for name in strides if name not in unit)], "i32")
        return Variant(
            name="channel_norm",
            dtype=dtype,
            shape=f"C={channels} {activation} {'channels_last' if last else 'contiguous'}{'' if centred else ' RMS'}",
            config=config,
            kernel=channel_norm_kernel,
            signature=dict.fromkeys(("x", "residual", "weight", "bias", "out"), f"*{dtype}") | sizes | {"eps": "fp32"},
            constexprs=dict.fromkeys(unit, 1)
            | {
                "ACTIVATION": activation,
                "HAS_RESIDUAL": activation == "none",
                "CENTRED": centred,
                "WHOLE": channels <= config.blocks["BLOCK_CHANNELS"],
            },
            multiples_of_16=tuple(sizes),
        )

    return [
        variant(channels, last, dtype, activation, centred, config)
        for last in (True, False)
        for channels, activation, centred in (
            (256, "relu", True),
            (512, "none", True),
            (1024, "none", True),
            (2048, "silu", True),
            (512, "none", False),
            (2048, "none", False),
        )
        for dtype in DTYPES.values()
        for config in TABLE.configs(capability, every, channels=channels, channels_last=last)
    ]
