"""One denoising step of the diffusion head: input projection, two launches a block (three with many rows), a tail.

The next step's input projection is not part of the tail: a tail program would walk over all columns of its few rows,
one small product after the other, where the projection's own launch has a program for each tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from dcar_fast.kernels import _denoise_parts as parts
from dcar_fast.kernels._denoise_linear import linear_kernel, modulate_kernel
from dcar_fast.kernels._denoise_parts import Counter
from dcar_fast.kernels._denoise_tail import tail_kernel
from dcar_fast.kernels.configs import INTERPRETED, Case, Config
from dcar_fast.kernels.offline import Variant

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TABLES = {
    "project": parts.PROJECT,
    "modulate": parts.MODULATE,
    "hidden": parts.HIDDEN,
    "residual": parts.RESIDUAL,
    "tail": parts.TAIL,
}
# the released head; rows of one guided image of 512 px and of sixteen
WIDTH, DEPTH, CHANNELS, ROWS = 1024, 6, 32, (512, 8192)


def denoise_step(
    x: torch.Tensor,
    modulation: torch.Tensor,
    weights: Any,
    coefficients: torch.Tensor,
    noise: torch.Tensor | Counter,
    *,
    guidance: float | torch.Tensor,
    temperature: float,
    from_conditional: bool,
    clip: bool,
) -> torch.Tensor:
    """x_{k-1} (R, C) float32 from x_k, with the arguments of ``reference/denoise_step.py``, on the current device.

    ``weights``: the fields of HeadWeights, contiguous. modulation: contiguous rows. x, coefficients and noise (R, C):
    contiguous float32; the noise may be a Counter. from_conditional: c + s (c - u), else u + s (c - u).
    """
    if not len(x):
        return torch.empty_like(x)
    width = len(weights.input_weight)
    guided = isinstance(guidance, torch.Tensor) or guidance != 1.0
    fed = x[: len(modulation) // 2] if guided else x
    h, moments = parts.project(fed, weights.input_weight, weights.input_bias)
    column = 0  # where a block's shifts begin; scales and gates follow
    for norm_weight, norm_bias, hidden_weight, hidden_bias, block_weight, block_bias in zip(
        weights.norm_weight,
        weights.norm_bias,
        weights.hidden_weight,
        weights.hidden_bias,
        weights.block_weight,
        weights.block_bias,
        strict=True,
    ):
        inner = parts.hidden(h, moments, (norm_weight, norm_bias), modulation, column, hidden_weight, hidden_bias)
        h, moments = parts.residual(inner, h, modulation, column + 2 * width, block_weight, block_bias)
        column += 3 * width
    return parts.tail(
        h,
        moments,
        modulation,
        column,
        weights.output_weight,
        weights.output_bias,
        x,
        noise,
        coefficients,
        guidance=guidance,
        temperature=temperature,
        from_conditional=from_conditional,
        clip=clip,
    )


def launches_per_block(rows: int, width: int, element: int) -> int:
    """Of one residual block on ``rows`` rows: 3 where the configuration that ships normalises before the product."""
    config = parts.HIDDEN.ship(INTERPRETED, rows=rows, width=width, bytes=element)
    return 2 if config.blocks["NORMALISE"] else 3


def sizes(part: str, rows: int, channels: int, element: int) -> dict[str, int]:
    """What the table of ``part`` is asked for when the network sees ``rows`` guided rows."""
    if part == "tail":
        return {"rows": rows // 2, "channels": channels, "bytes": element}
    rows = rows // 2 if part == "project" else rows
    return {"rows": rows, "width": WIDTH} | ({} if part == "modulate" else {"bytes": element})


def cases() -> list[Case]:
    """Every launch of the full-size guided step, for one image of 512 px and for sixteen."""

    def case(part: str, rows: int, dtype: torch.dtype) -> Case:
        return Case(
            f"{part} {DTYPES[dtype]} {rows}x{WIDTH}",
            TABLES[part],
            sizes(part, rows, CHANNELS, dtype.itemsize),
            lambda device: launches(device, rows, dtype)[part],
        )

    return [case(part, rows, dtype) for part in TABLES for rows in ROWS for dtype in (torch.float32, torch.bfloat16)]


def launches(device: torch.device, rows: int, dtype: torch.dtype) -> dict[str, Callable[[Config | None], object]]:
    """Each launch of a full-size step on random inputs, by its part's name. They return what configurations have in
    common, and the pieces of moments are not."""

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype)

    def entry(config: Config | None = None) -> tuple[torch.Tensor, parts.Moments]:
        return parts.project(x, first_weight, bias, config)

    x, seeds = torch.randn(rows // 2, CHANNELS, device=device), torch.randint(2**63 - 1, (rows // 2,), device=device)
    first_weight, weight, last_weight = random(WIDTH, CHANNELS), random(WIDTH, WIDTH), random(2 * CHANNELS, WIDTH)
    bias, last_bias, norm = random(1, WIDTH)[0], random(1, 2 * CHANNELS)[0], (random(1, WIDTH)[0], random(1, WIDTH)[0])
    modulation, numbers = random(rows, (3 * DEPTH + 2) * WIDTH), torch.rand(8, device=device)
    h, moments = entry()
    inner = parts.hidden(h, moments, norm, modulation, 0, weight, bias)
    last_h, last_moments = parts.residual(inner, h, modulation, 2 * WIDTH, weight, bias)
    settings = {"guidance": 4.5, "temperature": 1.0, "from_conditional": True, "clip": True}
    last = (last_h, last_moments, modulation, 3 * DEPTH * WIDTH, last_weight, last_bias, x)
    noise = Counter(seeds, torch.arange(rows // 2, device=device) % 256, 3)
    return {
        "project": lambda config: entry(config)[0],
        "modulate": lambda config: parts.modulate(h, moments, norm, modulation, 0, config),
        "hidden": lambda config: parts.hidden(h, moments, norm, modulation, 0, weight, bias, config),
        "residual": lambda config: parts.residual(inner, h, modulation, 2 * WIDTH, weight, bias, config)[0],
        "tail": lambda config: parts.tail(*last, noise, numbers, **settings, config=config),
    }


def offline_variants(capability: int, every: bool = False) -> list[Variant]:
    """Every launch of the full-size head, few rows and many; and the tails of other dialects and channels."""
    found = [
        variant
        for dtype in DTYPES
        for rows, part in (*((rows, part) for rows in ROWS for part in ("hidden", "residual")), (ROWS[0], "project"))
        for variant in _linear_variants(capability, every, part, rows, dtype)
    ]
    for dtype in DTYPES:
        found += _modulate_variants(capability, every, dtype)
        for channels, guided, both, counter in ((32, 1, 0, 1), (32, 0, 0, 1), (16, 1, 1, 0), (64, 1, 0, 1)):
            found += _tail_variants(capability, every, channels, guided, both, counter, dtype)
    return found


def _pieces(capability: int, dtype: torch.dtype) -> int:
    """Pieces of a row whose moments the second linear of a block leaves; with few rows there are the most."""
    config = parts.RESIDUAL.ship(capability, **sizes("residual", ROWS[0], CHANNELS, dtype.itemsize))
    return triton.next_power_of_2(triton.cdiv(WIDTH, config.blocks["BLOCK_N"]))


def _linear_variants(capability: int, every: bool, part: str, rows: int, dtype: torch.dtype) -> list[Variant]:
    name, integers = DTYPES[dtype], ("rows", "source_rows", "inner", "outer", "piece_width", "stride", "column")
    pointers = ("norm_weight", "norm_bias", "modulation", "weight", "bias", "residual", "out")
    signature = {"x": "*fp32" if part == "project" else f"*{name}", "x_moments": "*fp32", "out_moments": "*fp32"}
    signature |= dict.fromkeys(pointers, f"*{name}") | dict.fromkeys((*integers, "pieces"), "i32")
    flags = {"SILU": part == "hidden", "GATED": part == "residual", "MOMENTS": part != "hidden", "NORMALISE": 0}
    return [
        Variant(
            name=f"denoise_step.{part}",
            dtype=name,
            shape=f"{rows}x{WIDTH}",
            config=config,
            kernel=linear_kernel,
            signature=signature,
            constexprs={**flags, "PIECES": _pieces(capability, dtype) if config.blocks.get("NORMALISE") else 1},
            multiples_of_16=integers,
            tensor_cores=True,
        )
        for config in TABLES[part].configs(capability, every, **sizes(part, rows, CHANNELS, dtype.itemsize))
    ]


def _modulate_variants(capability: int, every: bool, dtype: torch.dtype) -> list[Variant]:
    name = DTYPES[dtype]
    integers = ("rows", "source_rows", "width", "piece_width", "stride", "column")
    pointers = ("x", "norm_weight", "norm_bias", "modulation", "out")
    signature = {"moments": "*fp32", "pieces": "i32"}
    return [
        Variant(
            name="denoise_step.modulate",
            dtype=name,
            shape=f"{ROWS[-1]}x{WIDTH}",
            config=config,
            kernel=modulate_kernel,
            signature=signature | dict.fromkeys(pointers, f"*{name}") | dict.fromkeys(integers, "i32"),
            constexprs={"PIECES": _pieces(capability, dtype)},
            multiples_of_16=integers,
        )
        for config in parts.MODULATE.configs(capability, every, rows=ROWS[-1], width=WIDTH)
    ]


def _tail_variants(
    capability: int, every: bool, channels: int, guided: int, both: int, counter: int, dtype: torch.dtype
) -> list[Variant]:
    name, integers = DTYPES[dtype], ("rows", "channels", "width", "piece_width", "stride", "column")
    signature = dict.fromkeys(("h", "modulation", "weight", "bias"), f"*{name}")
    signature |= dict.fromkeys(("moments", "x", "noise", "coefficients", "out"), "*fp32")
    signature |= dict.fromkeys((*integers, "pieces", "step"), "i32")
    stored = guided and both  # guidance of a graph of somebody else's sampler
    signature |= {"seeds": "*i64", "tokens": "*i64", "guidance": "*fp32" if stored else "fp32", "temperature": "fp32"}
    dialect = {
        "GUIDED": guided,
        "STORED": stored,
        "BOTH": both,
        "FROM_CONDITIONAL": 1 - both,
        "CLIP": 1 - both,
        "COUNTER": counter,
    }
    words = ("guided" if guided else "unguided", *(["all rows"] if both else []), *(["counter"] if counter else []))
    return [
        Variant(
            name="denoise_step.tail",
            dtype=name,
            shape=f"C={channels} {' '.join(words)}",
            config=config,
            kernel=tail_kernel,
            signature=signature,
            constexprs={**dialect, "PIECES": _pieces(capability, dtype)},
            multiples_of_16=integers,
            tensor_cores=True,
        )
        for config in parts.TAIL.configs(capability, every, **sizes("tail", ROWS[0], channels, dtype.itemsize))
    ]
