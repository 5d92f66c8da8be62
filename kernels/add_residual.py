"""Decoder input from token ids in one pass: gather, normalise, add the residual, channels first, cast."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels.configs import Case, Config, Rule, Table
from dcar_fast.kernels.offline import Variant


def tile(tokens: int, channels: int, num_warps: int) -> Config:
    return Config({"BLOCK_TOKENS": tokens, "BLOCK_CHANNELS": channels}, num_warps)


# more channels than a tile has are walked over in steps
RULES = (Rule({"channels": 32}, tile(32, 32, 4)), Rule({}, tile(32, 64, 8)))
TABLE = Table(
    "add_residual",
    shipped={"datacenter": RULES, "consumer": RULES},
    candidates=tuple(tile(tokens, 32, warps) for tokens in (16, 32, 64, 128) for warps in (2, 4, 8)),
    scaling=("tokens",),
)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def add_residual_kernel(
    ids,  # (B, N) int64
    codebook,  # (V, C)
    residual,  # (B, N, C), not read unless HAS_RESIDUAL
    out,  # (B, C, N)
    tokens,
    num_codes,
    channels,
    residual_image,
    residual_token,
    residual_channel,
    HAS_RESIDUAL: tl.constexpr,
    ONE_STEP: tl.constexpr,  # all channels fit in a tile
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    code = tl.load(ids + image * tokens + token, mask=live, other=-1)
    known = (code >= 0) & (code < num_codes)
    codes = codebook + code[:, None] * channels
    added = residual + image * residual_image + token.to(tl.int64)[:, None] * residual_token

    square = tl.zeros((BLOCK_TOKENS,), tl.float32)
    if not ONE_STEP:
        for start in range(0, channels, BLOCK_CHANNELS):
            channel = start + tl.arange(0, BLOCK_CHANNELS)
            mask = known[:, None] & (channel < channels)[None, :]
            x = tl.load(codes + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            square += tl.sum(x * x, axis=1)

    for start in range(0, BLOCK_CHANNELS if ONE_STEP else channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        inside = (channel < channels)[None, :]
        x = tl.load(codes + channel[None, :], mask=known[:, None] & inside, other=0.0).to(tl.float32)
        if ONE_STEP:
            square = tl.sum(x * x, axis=1)
        norm = tl.sqrt_rn(square)
        norm = tl.where(norm < 1e-12, 1e-12, norm)  # keeps NaN, which a maximum may drop
        # an id that is not in the codebook becomes NaN: the host does not look at ids
        x = tl.where(known[:, None], tl.div_rn(x, tl.broadcast_to(norm[:, None], x.shape)), float("nan"))
        if HAS_RESIDUAL:
            place = added + channel.to(tl.int64)[None, :] * residual_channel
            x += tl.load(place, mask=live[:, None] & inside, other=0.0).to(tl.float32)
        # Read along channels, written along tokens: the transposition goes through shared memory, both are coalesced.
        target = out + (image * channels + channel[:, None]) * tokens + token[None, :]
        tl.store(target, tl.trans(x).to(out.dtype.element_ty), mask=(channel < channels)[:, None] & live[None, :])


def add_residual(
    ids: torch.Tensor,
    codebook: torch.Tensor,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    config: Config | None = None,
) -> torch.Tensor:
    """Latents (B, C, h, w) of type ``dtype`` from ids (B, h, w) int64, codebook (V, C) and residual (B, h*w, C) or
    None, each float32, float16 or bfloat16: normalise(codebook[ids]) + residual, NaN where an id is outside 0..V-1. The
    residual may have any strides, the others are made contiguous. One launch on the current device; formula and checks:
    ``reference/add_residual.py``, ``ops/add_residual.py``.
    """
    batch, height, width = ids.shape
    num_codes, channels = codebook.shape
    out = torch.empty(batch, channels, height, width, dtype=dtype, device=ids.device)
    if out.numel() == 0:
        return out
    ids, codebook = ids.contiguous(), codebook.contiguous()
    config = config or TABLE.pick(ids.device, tokens=height * width, channels=channels)
    add_residual_kernel[(batch * triton.cdiv(height * width, config.blocks["BLOCK_TOKENS"]),)](
        ids,
        codebook,
        codebook if residual is None else residual,
        out,
        height * width,
        num_codes,
        channels,
        *((0, 0, 1) if residual is None else residual.stride()),
        HAS_RESIDUAL=residual is not None,
        ONE_STEP=channels <= config.blocks["BLOCK_CHANNELS"],
        **config.launch,
    )
    return out


def cases() -> list[Case]:
    """The full-size decoder input at 512 px, one image and sixteen."""

    def case(batch: int, dtype: torch.dtype) -> Case:
        def prepare(device: torch.device):
            ids = torch.randint(0, 16384, (batch, 16, 16), device=device)
            codebook, residual = torch.randn(16384, 32, device=device), torch.randn(batch, 256, 32, device=device)
            return lambda config: add_residual(ids, codebook, residual, dtype, config)

        return Case(f"{DTYPES[dtype]} {batch}x256x32", TABLE, {"tokens": 256, "channels": 32}, prepare)

    return [case(batch, dtype) for batch in (1, 16) for dtype in (torch.float32, torch.bfloat16)]


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """What the full-size model launches: 32 channels, any type, with and without residual; and the wide tile."""
    kinds = DTYPES.values()
    shipped = [("fp32", kind, 32, residual) for kind in kinds for residual in (True, False)]
    shipped += [(kind, kind, 32, True) for kind in kinds if kind != "fp32"]
    shipped += [("fp32", "fp32", 64, True), ("fp32", "fp32", 256, True)]
    return [
        Variant(
            name="add_residual",
            dtype=dtype,
            shape=f"C={channels} from {source}{'' if has_residual else ' discrete'}",
            config=config,
            kernel=add_residual_kernel,
            signature={"ids": "*i64", "codebook": f"*{source}", "residual": f"*{source}", "out": f"*{dtype}"}
            | dict.fromkeys(("tokens", "num_codes", "channels", "residual_image", "residual_token"), "i32"),
            constexprs={
                "residual_channel": 1,
                "HAS_RESIDUAL": has_residual,
                "ONE_STEP": channels <= config.blocks["BLOCK_CHANNELS"],
            },
            multiples_of_16=("tokens", "num_codes", "channels", "residual_image", "residual_token"),
        )
        for source, dtype, channels, has_residual in shipped
        for config in TABLE.configs(capability, every, tokens=256, channels=channels)
    ]
