"""The launches of one denoising step, each with its table of configurations."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from dcar_fast.kernels._denoise_linear import linear_kernel, modulate_kernel
from dcar_fast.kernels._denoise_tail import tail_kernel
from dcar_fast.kernels.configs import Config, Rule, Table

FEW = 1024  # rows up to which there are too few programs for large tiles


def linear(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps, num_stages)


def hidden_linear(normalise: int, *tile: int) -> Config:
    """``normalise``: inside the product (1), or before it, in a launch of its own (0)."""
    config = linear(*tile)
    return config._replace(blocks={**config.blocks, "NORMALISE": normalise})


def elementwise(m: int, k: int, num_warps: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_K": k}, num_warps, num_stages=1)


def tail_tile(m: int, c: int, k: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_C": c, "BLOCK_K": k}, num_warps, num_stages)


def rules(*pairs: tuple[dict[str, int], Config]) -> dict[str, tuple[Rule, ...]]:
    """The same for both classes of GPUs."""
    both = tuple(Rule(limits, config) for limits, config in pairs)
    return {"datacenter": both, "consumer": both}


HALF = {"bytes": 2}  # size of a weight
LARGE = tuple((*tile, stages) for tile in ((128, 64, 64, 4), (128, 128, 64, 8)) for stages in (3, 4))
PROJECT = Table(
    "denoise_step.project",
    shipped=rules((HALF, linear(64, 64, 32, 4, 2)), ({}, linear(64, 32, 32, 4, 2))),
    candidates=tuple(linear(m, n, 32, 4, 2) for m in (32, 64) for n in (32, 64, 128)),
    scaling=("rows",),
)
MODULATE = Table(
    "denoise_step.modulate",
    shipped=rules(({}, elementwise(8, 256, 4))),
    candidates=tuple(elementwise(m, k, w) for m in (4, 8, 16) for k in (128, 256, 512) for w in (4, 8)),
    scaling=("rows",),
)
HIDDEN = Table(
    "denoise_step.hidden",
    shipped=rules(
        ({**HALF, "rows": FEW}, hidden_linear(1, 64, 64, 64, 4, 3)),
        (HALF, hidden_linear(0, 128, 128, 64, 8, 3)),
        ({"rows": FEW}, hidden_linear(1, 64, 32, 32, 4, 2)),
        ({}, hidden_linear(0, 64, 32, 32, 4, 3)),
    ),
    candidates=(
        *(hidden_linear(1, m, n, k, 4, s) for m in (32, 64) for n in (32, 64) for k in (32, 64) for s in (2, 3)),
        *(hidden_linear(0, *tile) for tile in ((64, 32, 32, 4, 3), (64, 64, 64, 4, 3), *LARGE)),
    ),
    scaling=("rows",),
)
RESIDUAL = Table(
    "denoise_step.residual",
    shipped=rules(
        ({**HALF, "rows": FEW}, linear(64, 64, 64, 4, 4)),
        (HALF, linear(128, 128, 64, 8, 3)),
        ({}, linear(64, 32, 32, 4, 3)),
    ),
    candidates=(
        *(linear(m, n, k, 4, s) for m in (32, 64) for n in (32, 64) for k in (32, 64) for s in (3, 4)),
        *(linear(*tile) for tile in LARGE),
    ),
    scaling=("rows",),
)
# rows: those of one branch, of which a tile holds half as many under guidance
TAIL = Table(
    "denoise_step.tail",
    shipped=rules(
        ({**HALF, "channels": 16}, tail_tile(16, 16, 64, 4, 3)),
        ({**HALF, "channels": 32, "rows": FEW}, tail_tile(16, 32, 128, 4, 3)),
        ({**HALF, "channels": 32}, tail_tile(32, 32, 64, 4, 3)),
        ({"channels": 32}, tail_tile(16, 32, 64, 4, 2)),
        ({}, tail_tile(16, 64, 32, 4, 2)),
    ),
    candidates=(
        *(tail_tile(m, 32, k, 4, s) for m in (16, 32) for k in (32, 64, 128) for s in (2, 3)),
        *(tail_tile(m, 16, 64, 4, s) for m in (16, 32) for s in (2, 3)),
        *(tail_tile(16, 64, k, 4, s) for k in (32, 64) for s in (2, 3)),
    ),
    scaling=("rows",),
)


class Moments(NamedTuple):
    """Mean and sum of squared deviations of each piece of ``width`` columns of each row: values (rows, pieces, 2)."""

    values: torch.Tensor
    width: int

    @property
    def arguments(self) -> dict[str, int]:
        pieces = self.values.shape[1]
        return {"pieces": pieces, "piece_width": self.width, "PIECES": triton.next_power_of_2(pieces)}


class Counter(NamedTuple):
    """Noise made where it is used: seeds and tokens (rows of x,) int64, and the step in drawing order."""

    seeds: torch.Tensor
    tokens: torch.Tensor
    step: int


def project(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, config: Config | None = None
) -> tuple[torch.Tensor, Moments]:
    """x (rows, C) -> x W^T + b (rows, W) in the weights' dtype, and its moments. One launch."""
    config = config or PROJECT.pick(x.device, rows=len(x), width=len(weight), bytes=weight.element_size())
    return _linear(x, weight, bias, len(x), config)


def modulate(
    h: torch.Tensor,
    moments: Moments,
    norm: tuple[torch.Tensor, torch.Tensor],
    modulation: torch.Tensor,
    column: int,
    config: Config | None = None,
) -> torch.Tensor:
    """LN(h) * (1 + scale) + shift (rows, W), with the shifts at ``column`` of modulation (rows, .). One launch."""
    rows, width = len(modulation), h.shape[1]
    config = config or MODULATE.pick(h.device, rows=rows, width=width)
    out = torch.empty(rows, width, dtype=h.dtype, device=h.device)
    grid = (triton.cdiv(rows, config.blocks["BLOCK_M"]) * triton.cdiv(width, config.blocks["BLOCK_K"]),)
    modulate_kernel[grid](
        h,
        moments.values,
        *norm,
        modulation,
        out,
        rows,
        len(h),
        width,
        stride=modulation.stride(0),
        column=column,
        **moments.arguments,
        **config.launch,
    )
    return out


def hidden(
    h: torch.Tensor,
    moments: Moments,
    norm: tuple[torch.Tensor, torch.Tensor],
    modulation: torch.Tensor,
    column: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    config: Config | None = None,
) -> torch.Tensor:
    """silu((LN(h) * (1 + scale) + shift) W^T + b) (rows, W). One launch, or two, as the configuration says.

    h (rows or rows / 2, W): row r of ``modulation`` goes with row r modulo len(h).
    """
    rows = len(modulation)
    config = config or HIDDEN.pick(h.device, rows=rows, width=len(weight), bytes=weight.element_size())
    if config.blocks["NORMALISE"]:
        more = {"moments": moments, "norm": norm, "modulation": modulation, "column": column}
    else:
        h, more = modulate(h, moments, norm, modulation, column), {}
    return _linear(h, weight, bias, rows, config, silu=True, **more)[0]


def residual(
    x: torch.Tensor,
    h: torch.Tensor,
    modulation: torch.Tensor,
    column: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    config: Config | None = None,
) -> tuple[torch.Tensor, Moments]:
    """h + gate * (x W^T + b) (rows, W) and its moments, with the gates at ``column``. One launch. h as in hidden."""
    config = config or RESIDUAL.pick(h.device, rows=len(x), width=len(weight), bytes=weight.element_size())
    return _linear(x, weight, bias, len(x), config, residual=h, modulation=modulation, column=column)


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    rows: int,
    config: Config,
    *,
    silu: bool = False,
    moments: Moments | None = None,
    norm: tuple[torch.Tensor, torch.Tensor] | None = None,
    residual: torch.Tensor | None = None,
    modulation: torch.Tensor | None = None,
    column: int = 0,
) -> tuple[torch.Tensor, Moments]:
    """One launch of linear_kernel: what is not None is used. The moments of what follows silu are not made."""
    outer, inner = weight.shape
    tiles = triton.cdiv(outer, config.blocks["BLOCK_N"])
    out = torch.empty(rows, outer, dtype=weight.dtype, device=x.device)
    out_moments = torch.empty(rows, 0 if silu else tiles, 2, dtype=torch.float32, device=x.device)
    linear_kernel[(triton.cdiv(rows, config.blocks["BLOCK_M"]) * tiles,)](
        x,
        out_moments if moments is None else moments.values,
        *(norm or (bias, bias)),
        bias if modulation is None else modulation,
        weight,
        bias,
        out if residual is None else residual,
        out,
        out_moments,
        rows,
        len(x if residual is None else residual),
        inner,
        outer,
        stride=0 if modulation is None else modulation.stride(0),
        column=column,
        SILU=silu,
        GATED=residual is not None,
        MOMENTS=not silu,
        **({"pieces": 1, "piece_width": 1, "PIECES": 1} if moments is None else moments.arguments),
        **{"NORMALISE": 0, **config.launch},
    )
    return out, Moments(out_moments, config.blocks["BLOCK_N"])


def tail(
    h: torch.Tensor,
    moments: Moments,
    modulation: torch.Tensor,
    column: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    noise: torch.Tensor | Counter,
    coefficients: torch.Tensor,
    *,
    guidance: float | torch.Tensor,
    temperature: float,
    from_conditional: bool,
    clip: bool,
    config: Config | None = None,
) -> torch.Tensor:
    """x' as x (R or 2R, C) float32, from the residual stream h (rows, W). One launch. See ops/denoise_step.py."""
    stored = isinstance(guidance, torch.Tensor)
    guided = stored or guidance != 1.0
    rows, (carried, channels) = len(h) // 2 if guided else len(h), x.shape
    config = config or TAIL.pick(x.device, rows=rows, channels=channels, bytes=weight.element_size())
    out = torch.empty_like(x)
    counter = isinstance(noise, Counter)
    own = config.blocks["BLOCK_M"] // (2 if guided else 1)
    grid = (triton.cdiv(rows, own), triton.cdiv(channels, config.blocks["BLOCK_C"]))
    tail_kernel[grid](
        h,
        moments.values,
        modulation,
        weight,
        bias,
        x,
        x if counter else noise,
        noise.seeds if counter else x,
        noise.tokens if counter else x,
        coefficients,
        out,
        rows,
        channels,
        h.shape[1],
        stride=modulation.stride(0),
        column=column,
        step=noise.step if counter else 0,
        guidance=guidance,
        temperature=temperature,
        GUIDED=guided,
        STORED=stored,
        BOTH=guided and carried > rows,
        FROM_CONDITIONAL=from_conditional,
        CLIP=clip,
        COUNTER=counter,
        **moments.arguments,
        **config.launch,
    )
    return out
