"""Depthwise 3x3 convolution between activation and gate in one pass, for either memory format."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels._activation import activate
from dcar_fast.kernels._layout import channels_last, empty_image
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant


def tile(steps: int, lanes: int, unroll: int, channels: int, num_warps: int) -> Config:
    blocks = {"BLOCK_STEPS": steps, "BLOCK_LANES": lanes, "UNROLL": unroll, "BLOCK_CHANNELS": channels}
    return Config(blocks, num_warps)


# A block walks BLOCK_STEPS along one axis of the image and is BLOCK_LANES * UNROLL wide along the other, the cross
# axis. channels_last: threads lie along the channels alone; each walks along a row and works on UNROLL rows at once, so
# that an input is activated (UNROLL + 2) / UNROLL times. Contiguous: threads lie along rows and walk down; the three
# columns that an output needs are read and activated one by one.
RULES = (
    Rule({"channels_last": 0, "width": 16}, tile(16, 16, 1, 64, 4)),
    Rule({"channels_last": 0, "width": 32}, tile(16, 32, 1, 32, 4)),
    Rule({"channels_last": 0}, tile(16, 64, 1, 16, 4)),
    Rule({"width": 16}, tile(8, 1, 4, 256, 4)),
    Rule({"width": 32}, tile(16, 1, 4, 256, 4)),
    Rule({}, tile(32, 1, 4, 256, 4)),
)
TABLE = Table(
    "depthwise_gate",
    shipped={"datacenter": RULES, "consumer": RULES},
    candidates=(
        *(tile(steps, 1, unroll, 256, 4) for steps in (8, 16, 32) for unroll in (2, 4)),
        *(tile(16, 1, unroll, 128, 2) for unroll in (2, 4)),
        tile(16, 1, 8, 256, 8),
        *(tile(16, lanes, 1, 1024 // lanes, 4) for lanes in (16, 32, 64)),
    ),
    scaling=("width",),
)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def load_taps(weight, channel, inside, walk, cross):
    """The nine weights of each channel, indexed 3 * walk + cross."""
    taps = ()
    for tap in tl.static_range(9):
        place = weight + channel + (tap // 3) * walk + (tap % 3) * cross
        taps = taps + (tl.load(place, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def add_line(sums, line, taps, FIRST: tl.constexpr, UNROLL: tl.constexpr):
    """``sums`` of UNROLL outputs plus three taps from FIRST on of a line of UNROLL + 2 inputs."""
    more = ()
    for u in tl.static_range(UNROLL):
        total = sums[u] + line[u] * taps[FIRST] + line[u + 1] * taps[FIRST + 1] + line[u + 2] * taps[FIRST + 2]
        more = more + (total,)
    return more


@triton.jit
def repeat(value, UNROLL: tl.constexpr):
    copies = ()
    for _ in tl.static_range(UNROLL):
        copies = copies + (value,)
    return copies


@triton.jit
def depthwise_gate_kernel(
    x,  # (B, 2C, walk, cross) with strides
    weight,  # (2C, 1, walk, cross) with strides
    bias,  # (2C,)
    out,  # (B, C, walk, cross) with strides
    channels,  # C
    walk_size,
    cross_size,
    x_image,
    x_channel,
    x_walk,
    x_cross,
    weight_channel,
    weight_walk,
    weight_cross,
    out_image,
    out_channel,
    out_walk,
    out_cross,
    ACTIVATION: tl.constexpr,
    BLOCK_STEPS: tl.constexpr,
    BLOCK_LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    WIDTH: tl.constexpr = BLOCK_LANES * UNROLL
    across = tl.cdiv(cross_size, WIDTH)
    along = tl.cdiv(walk_size, BLOCK_STEPS)
    image = (tl.program_id(0) // (across * along)).to(tl.int64)
    start = (tl.program_id(0) // across % along * BLOCK_STEPS).to(tl.int64)
    lane = (tl.program_id(0) % across * WIDTH + UNROLL * tl.arange(0, BLOCK_LANES)).to(tl.int64)[None, :]
    channel = (tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS))[:, None]
    inside = channel < channels
    channel = channel.to(tl.int64)

    value_taps = load_taps(weight, channel * weight_channel, inside, weight_walk, weight_cross)
    gate_taps = load_taps(weight, (channel + channels) * weight_channel, inside, weight_walk, weight_cross)
    value_bias = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    gate_bias = tl.load(bias + channels + channel, mask=inside, other=0.0).to(tl.float32)
    value_bias = tl.broadcast_to(value_bias, (BLOCK_CHANNELS, BLOCK_LANES))
    gate_bias = tl.broadcast_to(gate_bias, (BLOCK_CHANNELS, BLOCK_LANES))

    x += image * x_image + channel * x_channel
    out += image * out_image + channel * out_channel
    gate = tl.cast(channels, tl.int64) * x_channel
    # Sums of the outputs one step back, which lack the input at hand alone, and of those here. Every input is read once
    # per block and goes into three steps of outputs.
    value_back, value_here = repeat(value_bias, UNROLL), repeat(value_bias, UNROLL)
    gate_back, gate_here = repeat(gate_bias, UNROLL), repeat(gate_bias, UNROLL)
    for step in range(start - 1, tl.minimum(start + BLOCK_STEPS, walk_size) + 1):
        values, gates = (), ()
        for u in tl.static_range(UNROLL + 2):
            place = lane + (u - 1)
            there = inside & (step >= 0) & (step < walk_size) & (place >= 0) & (place < cross_size)
            input = x + step * x_walk + place * x_cross
            loaded = tl.load(input, mask=there, other=0.0).to(tl.float32)  # 0 outside: act(0) is 0
            values = values + (activate(loaded, ACTIVATION, EXACT),)
            loaded = tl.load(input + gate, mask=there, other=0.0).to(tl.float32)
            gates = gates + (activate(loaded, ACTIVATION, EXACT),)
        value_back = add_line(value_back, values, value_taps, 6, UNROLL)
        gate_back = add_line(gate_back, gates, gate_taps, 6, UNROLL)
        for u in tl.static_range(UNROLL):
            place = lane + u
            result = value_back[u] * activate(gate_back[u], ACTIVATION, EXACT)
            output = out + (step - 1) * out_walk + place * out_cross
            tl.store(output, result.to(out.dtype.element_ty), mask=inside & (step > start) & (place < cross_size))
        value_back = add_line(value_here, values, value_taps, 3, UNROLL)
        gate_back = add_line(gate_here, gates, gate_taps, 3, UNROLL)
        value_here = add_line(repeat(value_bias, UNROLL), values, value_taps, 0, UNROLL)
        gate_here = add_line(repeat(gate_bias, UNROLL), gates, gate_taps, 0, UNROLL)


def depthwise_gate(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str, config: Config | None = None
) -> torch.Tensor:
    """(B, C, H, W) in the memory format of x (B, 2C, H, W), from weight (2C, 1, 3, 3) and bias (2C,). One launch on the
    current device; sums in float32. Formula and checks: ``reference/depthwise_gate.py``, ``ops/depthwise_gate.py``.
    Strides are respected, those of the weight included.
    """
    batch, doubled, height, width = x.shape
    channels = doubled // 2
    out = empty_image(x, channels, height, width)
    if out.numel() == 0:
        return out
    last = channels_last(x)
    config = config or TABLE.pick(x.device, channels_last=last, width=width)
    flat, weight = out, weight[:, 0]  # (2C, 3, 3)
    if last:  # walks along the rows
        x, flat, weight = x.transpose(2, 3), out.transpose(2, 3), weight.transpose(1, 2)
    blocks = config.blocks
    along = triton.cdiv(x.shape[2], blocks["BLOCK_STEPS"])
    across = triton.cdiv(x.shape[3], blocks["BLOCK_LANES"] * blocks["UNROLL"])
    depthwise_gate_kernel[(batch * along * across, triton.cdiv(channels, blocks["BLOCK_CHANNELS"]))](
        x,
        weight,
        bias.contiguous(),
        flat,
        channels,
        *x.shape[2:],
        *x.stride(),
        *weight.stride(),
        *flat.stride(),
        ACTIVATION=activation,
        **config.launch,
    )
    return out


def cases() -> list[Case]:
    """The decoder's three EfficientViT stages at 512 px, channels_last."""

    def case(batch: int, channels: int, side: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            x = torch.randn(batch, side, side, 2 * channels, device=device).to(dtype).permute(0, 3, 1, 2)
            weight = torch.randn(2 * channels, 1, 3, 3, device=device).to(dtype)
            bias = torch.randn(2 * channels, device=device).to(dtype)
            return lambda config: depthwise_gate(x, weight, bias, "silu", config)

        sizes = {"channels_last": 1, "width": side}
        return Case(f"{DTYPES[dtype]} {batch}x{2 * channels}x{side}x{side}", TABLE, sizes, prepare)

    return [
        case(batch, channels, side, dtype)
        for batch in (1, 16)
        for channels, side in ((4096, 16), (4096, 32), (2048, 64))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """The decoder's three EfficientViT stages in either memory format."""
    strides = [f"{name}_{axis}" for name in ("x", "out") for axis in ("image", "channel", "walk", "cross")]

    def variant(last: bool, width: int, dtype: str, config: Config) -> Variant:
        unit = [name for name in strides if name.endswith("_channel" if last else "_cross")]
        taps = {"weight_walk": 1, "weight_cross": 3} if last else {"weight_walk": 3, "weight_cross": 1}
        sizes = ["channels", "walk_size", "cross_size", *(name for name in strides if name not in unit)]
        tap = min(taps, key=taps.get)
        return Variant(
            name="depthwise_gate",
            dtype=dtype,
            shape=f"W={width} {'channels_last' if last else 'contiguous'}",
            config=config,
            kernel=depthwise_gate_kernel,
            signature=dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}")
            | dict.fromkeys([*sizes, "weight_channel", *(name for name in taps if name != tap)], "i32"),
            constexprs=dict.fromkeys([*unit, tap], 1) | {"ACTIVATION": "silu"},
            multiples_of_16=tuple(sizes),
        )

    return [
        variant(last, width, dtype, config)
        for last in (True, False)
        for width in ((16, 64) if last else (16, 32, 64))
        for dtype in DTYPES.values()
        for config in TABLE.configs(capability, every, channels_last=last, width=width)
    ]
