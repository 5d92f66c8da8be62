"""Decoder input from token ids in one pass: gather, normalise, add the residual, channels first, cast."""

import torch
import triton
import triton.language as tl

from dcar_fast.kernels.offline import Variant

# channels up to this number -> tile and warps; the last entry walks over more channels in steps of its tile
CONFIGS = {
    32: {"BLOCK_TOKENS": 32, "BLOCK_CHANNELS": 32, "num_warps": 4},
    64: {"BLOCK_TOKENS": 32, "BLOCK_CHANNELS": 64, "num_warps": 8},
}


@triton.jit
def add_residual_kernel(
    ids,  # (B, N) int64
    codebook,  # (V, C) float32
    residual,  # (B, N, C) float32, not read unless HAS_RESIDUAL
    out,  # (B, C, N)
    tokens,
    num_codes,
    channels,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    row = image * tokens + token
    code = tl.load(ids + row, mask=live, other=-1)
    known = (code >= 0) & (code < num_codes)

    square = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = known[:, None] & (channel < channels)[None, :]
        x = tl.load(codebook + code[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        square += tl.sum(x * x, axis=1)
    norm = tl.sqrt_rn(square)
    norm = tl.where(norm < 1e-12, 1e-12, norm)  # keeps NaN, which a maximum may drop

    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        inside = (channel < channels)[None, :]
        x = tl.load(codebook + code[:, None] * channels + channel[None, :], mask=known[:, None] & inside, other=0.0)
        # an id that is not in the codebook becomes NaN: the host does not look at ids
        x = tl.where(known[:, None], tl.div_rn(x, tl.broadcast_to(norm[:, None], x.shape)), float("nan"))
        if HAS_RESIDUAL:
            x += tl.load(residual + row[:, None] * channels + channel[None, :], mask=live[:, None] & inside, other=0.0)
        place = (image * channels + channel[:, None]) * tokens + token[None, :]  # (channels, tokens): runs along tokens
        tl.store(out + place, tl.trans(x).to(out.dtype.element_ty), mask=(channel < channels)[:, None] & live[None, :])


def config(channels: int) -> dict[str, int]:
    """The entry of ``CONFIGS`` for this number of channels."""
    return next((entry for most, entry in CONFIGS.items() if channels <= most), list(CONFIGS.values())[-1])


def add_residual(
    ids: torch.Tensor, codebook: torch.Tensor, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Latents (B, C, h, w) of type ``dtype`` from ids (B, h, w) int64, codebook (V, C) and residual (B, h*w, C) or
    None, both float32: normalise(codebook[ids]) + residual, NaN where an id is outside 0..V-1. One launch on the
    current device; formula and checks: ``reference/add_residual.py``, ``ops/add_residual.py``.
    """
    batch, height, width = ids.shape
    num_codes, channels = codebook.shape
    out = torch.empty(batch, channels, height, width, dtype=dtype, device=ids.device)
    if out.numel() == 0:
        return out
    ids, codebook = ids.contiguous(), codebook.contiguous()
    blocks = config(channels)
    add_residual_kernel[(batch * triton.cdiv(height * width, blocks["BLOCK_TOKENS"]),)](
        ids,
        codebook,
        codebook if residual is None else residual.contiguous(),
        out,
        height * width,
        num_codes,
        channels,
        HAS_RESIDUAL=residual is not None,
        **blocks,
    )
    return out


def offline_variants() -> list[Variant]:
    """What the full-size model launches: 32 channels, any output type, with and without residual; and the wide tile."""
    return [
        *(_variant(32, dtype, has_residual) for dtype in ("fp32", "fp16", "bf16") for has_residual in (True, False)),
        _variant(64, "fp32", True),
    ]


def _variant(channels: int, dtype: str, has_residual: bool) -> Variant:
    blocks = config(channels)
    pointers = {"ids": "*i64", "codebook": "*fp32", "residual": "*fp32", "out": f"*{dtype}"}
    sizes = ("tokens", "num_codes", "channels")
    return Variant(
        label=f"add_residual C={channels} {dtype}{'' if has_residual else ' discrete'}",
        kernel=add_residual_kernel,
        signature={**pointers, **dict.fromkeys(sizes, "i32")},
        constexprs={name: blocks[name] for name in ("BLOCK_TOKENS", "BLOCK_CHANNELS")} | {"HAS_RESIDUAL": has_residual},
        options={"num_warps": blocks["num_warps"]},
        multiples_of_16=sizes,
    )
