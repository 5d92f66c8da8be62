"""One whole reverse diffusion step of a MAR-family head, on the fastest backend there is.

    weights = pack_head(head, torch.bfloat16)                    # once
    steps = step_coefficients(schedule, device)                  # (K, 8), once
    times = embed_timesteps(weights, schedule.timesteps)         # (K, W), once
    condition = embed_condition(weights, hidden)                 # (rows, W), once per sample
    for i, k in enumerate(reversed(range(schedule.num_steps))):
        x = denoise_step(x, modulations(weights, condition, times[k]), weights, steps[k], LatentNoise(seeds, tokens, i),
                         guidance=4.5, temperature=1.0, formula="c+s(c-u)", clip=True)

Nothing in the loop looks at a value on the host, so a CUDA graph can hold all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.noise import LatentNoise
from dcar_fast.ops._checks import (
    check_floating,
    check_int64,
    check_no_grad,
    check_number,
    check_same_device,
    check_tensor,
    check_values,
)
from dcar_fast.ops._dispatch import Backend, choose, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.reference import denoise_step as reference
from dcar_fast.reference.denoise_step import FORMULAS, HeadWeights

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def denoise_step(
    x: Tensor,
    modulation: Tensor,
    weights: HeadWeights,
    coefficients: Tensor,
    noise: Tensor | LatentNoise,
    *,
    guidance: float | Tensor,
    temperature: float,
    formula: str,
    clip: bool,
    backend: str | None = None,
) -> Tensor:
    """x_{k-1} float32 from x_k (R, C) float32: network, guidance, posterior and noise. Formula:
    ``reference/denoise_step.py``.

    modulation (rows, 3DW + 2W) from :func:`modulations`, weights from :func:`pack_head` (one of float32, float16,
    bfloat16; the residual stream between the blocks is rounded to it, sums are float32), coefficients (8,) float32: row
    k of :func:`step_coefficients`. noise: standard normals like x, or a LatentNoise of R rows, whose values never are
    in memory. Where the coefficients say that this is the last step, no noise is added, whatever it is.

    guidance 1: rows = R, every row for itself. Otherwise the first half of the rows is conditional, the second
    unconditional, and R is rows / 2 (x holds the conditional half) or rows (both halves: both are fed the first
    one's x and share the guided epsilon, each keeps its own x, variance and noise). A scalar float32 tensor is guidance
    whatever its value, at which nobody looks: a CUDA graph can be given another one. formula of the guided epsilon:
    "c+s(c-u)" (DC-AR, HART) or "u+s(c-u)" (MAR). clip: x_0 is clamped to [-1, 1]. temperature: factor on the noise.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together and for
    inputs that ask for a gradient, because there is none.
    """
    if not isinstance(weights, HeadWeights):
        raise ValueError(f"weights is a {type(weights).__name__}, allowed are HeadWeights, which pack_head makes")
    for name, value in weights._asdict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"weights.{name} is a {type(value).__name__}, allowed is a tensor")
    check_tensor("weights.input_weight", weights.input_weight, ("W", "C"))
    check_tensor("x", x, ("R", weights.channels))
    if x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype}, allowed is torch.float32")
    _check_weights(weights, x)
    columns = (3 * weights.depth + 2) * weights.width
    check_tensor("modulation", modulation, ("rows", columns))
    check_floating("modulation", modulation)
    check_tensor("coefficients", coefficients, (len(reference.Coefficients._fields),))
    if coefficients.dtype != torch.float32:
        raise ValueError(f"coefficients is {coefficients.dtype}, allowed is torch.float32")
    check_same_device("x", x, "modulation", modulation)
    check_same_device("x", x, "coefficients", coefficients)
    stored = guidance if isinstance(guidance, Tensor) else None
    if stored is not None:
        check_tensor("guidance", stored, ())
        check_same_device("x", x, "guidance", stored)
        if stored.dtype != torch.float32:
            raise ValueError(f"guidance is {stored.dtype}, allowed are torch.float32 and numbers")
        guidance = 0.0  # in the tensor
    else:
        check_number("guidance", guidance)
    _check_settings(temperature, formula, clip)
    _check_rows(x.shape[0], modulation.shape[0], guidance)
    asked = {"x": x, "modulation": modulation, "coefficients": coefficients, **weights._asdict()}
    check_no_grad("denoise_step", **asked, **({} if stored is None else {"guidance": stored}))
    values, seeds, tokens, step = _check_noise(noise, x)
    settings = (float(guidance), float(temperature), formula, clip, stored, backend)
    return _denoise_step(x, modulation, list(weights), coefficients, values, seeds, tokens, step, *settings)


def _check_weights(weights: HeadWeights, x: Tensor) -> None:
    width, channels, depth = weights.width, weights.channels, weights.depth
    shapes = {
        "input_weight": (width, channels),
        "input_bias": (width,),
        "norm_weight": (depth, width),
        "norm_bias": (depth, width),
        "hidden_weight": (depth, width, width),
        "hidden_bias": (depth, width),
        "block_weight": (depth, width, width),
        "block_bias": (depth, width),
        "output_weight": (2 * channels, width),
        "output_bias": (2 * channels,),
    }
    dtype = weights.input_weight.dtype
    if dtype not in DTYPES or 0 in (width, channels, depth):
        came = f"{dtype} with width {width}, {channels} channels and {depth} blocks"
        raise ValueError(f"weights are {came}, allowed are {', '.join(map(str, DTYPES))} and sizes of at least 1")
    for name, shape in shapes.items():
        value = getattr(weights, name)
        check_tensor(f"weights.{name}", value, shape)
        if value.dtype != dtype:
            raise ValueError(f"weights.{name} is {value.dtype}, allowed is the type of input_weight, {dtype}")
        check_same_device("x", x, f"weights.{name}", value)


def _check_settings(temperature: float, formula: str, clip: bool) -> None:
    check_number("temperature", temperature)
    if not isinstance(clip, bool):
        raise ValueError(f"clip is {clip!r}, allowed are True and False")
    if formula not in FORMULAS:
        raise ValueError(f"formula is {formula!r}, allowed are {', '.join(map(repr, FORMULAS))}")


def _check_rows(carried: int, rows: int, guidance: float) -> None:
    if guidance == 1:
        if rows != carried:
            raise ValueError(f"modulation has {rows} rows, allowed without guidance is one for each of x: {carried}")
    elif rows % 2 or (carried != rows and 2 * carried != rows):
        raise ValueError(
            f"modulation has {rows} rows for {carried} of x, allowed under guidance is an even number, and all of them "
            "or the first half in x"
        )


def _check_noise(noise: Tensor | LatentNoise, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """(values, seeds, tokens, step): the values, or the three others."""
    if not isinstance(noise, LatentNoise):
        check_tensor("noise", noise, x.shape)
        check_floating("noise", noise)
        check_same_device("x", x, "noise", noise)
        check_no_grad("denoise_step", noise=noise)
        return noise, None, None, 0
    for name, value in (("noise.seeds", noise.seeds), ("noise.tokens", noise.tokens)):
        check_tensor(name, value, (x.shape[0],))
        check_int64(name, value)
        check_same_device("x", x, name, value)
    if isinstance(noise.step, bool) or not isinstance(noise.step, int) or not 0 <= noise.step < 2**31:
        raise ValueError(f"noise.step is {noise.step!r}, allowed is an integer in 0..2^31-1")
    return None, noise.seeds, noise.tokens, noise.step


def _run(
    x: Tensor,
    modulation: Tensor,
    weights: list[Tensor],
    coefficients: Tensor,
    values: Tensor | None,
    seeds: Tensor | None,
    tokens: Tensor | None,
    step: int,
    guidance: float,
    temperature: float,
    formula: str,
    clip: bool,
    stored: Tensor | None,
    backend: str | None,
) -> Tensor:
    if values is None:
        assert seeds is not None and tokens is not None
        check_values("noise.seeds", seeds, 2**63 - 1)
        check_values("noise.tokens", tokens, 2**32 - 1)
        noise: Tensor | LatentNoise = LatentNoise(seeds, tokens, step)
    else:
        noise = values.float()
    scale = guidance if stored is None else stored
    settings = {"guidance": scale, "temperature": temperature, "formula": formula, "clip": clip}
    run = choose("denoise_step", x.device, backend).run
    return run(x, modulation, HeadWeights(*weights), coefficients, noise, **settings)


def _fake(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_denoise_step = define(
    "denoise_step(Tensor x, Tensor modulation, Tensor[] weights, Tensor coefficients, Tensor? values, Tensor? seeds, "
    "Tensor? tokens, int step, float guidance, float temperature, str formula, bool clip, Tensor? stored, "
    "str? backend) -> Tensor",
    _run,
    _fake,
)


def _run_reference(
    x: Tensor,
    modulation: Tensor,
    weights: HeadWeights,
    coefficients: Tensor,
    noise: Tensor | LatentNoise,
    **settings: float | str | bool | Tensor,
) -> Tensor:
    values = noise.normal(x.shape[1]) if isinstance(noise, LatentNoise) else noise
    return reference.denoise_step(x, modulation, weights, coefficients, values, **settings)


def _run_triton(
    x: Tensor,
    modulation: Tensor,
    weights: HeadWeights,
    coefficients: Tensor,
    noise: Tensor | LatentNoise,
    *,
    formula: str,
    **settings: float | bool | Tensor,
) -> Tensor:
    from dcar_fast.kernels import denoise_step as kernels  # triton is loaded on use only

    if isinstance(noise, LatentNoise):
        drawn = kernels.Counter(noise.seeds.contiguous(), noise.tokens.contiguous(), noise.step)
    else:
        drawn = noise.contiguous()
    # copies only of what is not contiguous; rows of modulations may be apart, as they are in a slice of many steps'
    modulation = modulation if modulation.stride(1) == 1 else modulation.contiguous()
    weights = HeadWeights(*(value.contiguous() for value in weights))
    with current(x.device):
        return kernels.denoise_step(
            x.contiguous(),
            modulation,
            weights,
            coefficients.contiguous(),
            drawn,
            from_conditional=formula == "c+s(c-u)",
            **settings,
        )


def _launches(x: Tensor, modulation: Tensor, weights: list[Tensor], *others: object) -> int:
    """The projection, two or three a block, the tail: 14 for the released head and one image."""
    from dcar_fast.kernels.denoise_step import launches_per_block  # triton is loaded on use only

    head = HeadWeights(*weights)
    return 2 + head.depth * launches_per_block(len(modulation), head.width, head.input_weight.element_size())


register(
    "denoise_step",
    Backend("triton", _run_triton, triton_usable, launches=_launches),
    Backend("reference", _run_reference, everywhere),
)
