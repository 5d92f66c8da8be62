"""Standard normals of the denoising steps from seeds: Philox words and Box-Muller, written once."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels import philox
from dcar_fast.kernels._sampling import interleave4
from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant


def tile(quads: int, num_warps: int) -> Config:
    return Config({"BLOCK_QUADS": quads}, num_warps)


RULES = (Rule({}, tile(256, 4)),)
TABLE = Table(
    "latent_noise",
    shipped={"datacenter": RULES, "consumer": RULES},
    candidates=tuple(tile(quads, warps) for quads in (64, 128, 256, 512) for warps in (2, 4, 8)),
    scaling=("rows", "channels"),
)


@triton.jit(do_not_specialize=["step"])
def latent_noise_kernel(
    seeds,  # (R,) int64
    tokens,  # (R,) int64
    out,  # (R, C) float32, contiguous
    rows,
    channels,
    step,
    STREAM: tl.constexpr,
    BLOCK_QUADS: tl.constexpr,
):
    quads = tl.cdiv(channels, 4)  # counters of one row; the program's are numbered row by row
    start = tl.program_id(0).to(tl.int64) * BLOCK_QUADS
    first_row, first = start // quads, (start % quads).to(tl.int32)
    number = first + tl.arange(0, BLOCK_QUADS)
    row = first_row + number // quads
    live = row < rows
    seed, token = tl.load(seeds + row, mask=live, other=0), tl.load(tokens + row, mask=live, other=0)
    w0, w1, w2, w3 = philox.philox(seed, number % quads, token, step, STREAM)
    a, b, c, d = philox.normal(w0, w1, w2, w3)

    place = first * 4 + tl.arange(0, BLOCK_QUADS * 4)
    row, channel = first_row + place // (quads * 4), place % (quads * 4)
    tl.store(out + row * channels + channel, interleave4(a, b, c, d), mask=(row < rows) & (channel < channels))


def latent_noise(
    seeds: torch.Tensor,
    tokens: torch.Tensor,
    channels: int,
    step: int,
    *,
    initial: bool,
    config: Config | None = None,
) -> torch.Tensor:
    """(R, channels) float32 standard normals for seeds and tokens (R,) int64, any strides. One launch on the current
    device; formula and checks: ``reference/latent_noise.py``, ``ops/latent_noise.py``.
    """
    rows = seeds.shape[0]
    out = torch.empty(rows, channels, dtype=torch.float32, device=seeds.device)
    if rows:
        config = config or TABLE.pick(seeds.device, rows=rows, channels=channels)
        latent_noise_kernel[(triton.cdiv(rows * triton.cdiv(channels, 4), config.blocks["BLOCK_QUADS"]),)](
            seeds.contiguous(),
            tokens.contiguous(),
            out,
            rows,
            channels,
            step,
            STREAM=(philox.STREAM_LATENT_INIT if initial else philox.STREAM_LATENT).value,
            **config.launch,
        )
    return out


def cases() -> list[Case]:
    """The first latents of one image of 256 tokens, and of sixteen."""

    def case(rows: int) -> Case:
        def prepare(device: torch.device):
            seeds, tokens = torch.arange(rows, device=device) // 256, torch.arange(rows, device=device) % 256
            return lambda config: latent_noise(seeds, tokens, 32, 0, initial=True, config=config)

        return Case(f"fp32 {rows}x32", TABLE, {"rows": rows, "channels": 32}, prepare)

    return [case(256), case(4096)]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """32 channels, the full-size model's: both streams."""
    return [
        Variant(
            name="latent_noise",
            dtype="fp32",
            shape=f"C=32{kind}",
            config=config,
            kernel=latent_noise_kernel,
            signature={"seeds": "*i64", "tokens": "*i64", "out": "*fp32"}
            | dict.fromkeys(("rows", "channels", "step"), "i32"),
            constexprs={"STREAM": stream.value},
            multiples_of_16=("rows", "channels"),
        )
        for kind, stream in ((" initial", philox.STREAM_LATENT_INIT), ("", philox.STREAM_LATENT))
        for config in TABLE.configs(capability, every, rows=256, channels=32)
    ]
