"""Guided Gumbel-max sampling of one token per row from given logits, on the fastest backend there is."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.noise import TokenNoise
from dcar_fast.ops import _native
from dcar_fast.ops._dispatch import Backend, choose, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.ops._sampling import Draw, check_noise, check_rows, check_settings, empty_choice, for_kernels
from dcar_fast.reference import sample_from_logits as reference


def sample_from_logits(
    cond: Tensor,
    uncond: Tensor | None,
    *,
    guidance: float,
    softmax_temperature: float,
    tau: float,
    noise: Tensor | TokenNoise,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """ids (R,) int64 and confidence (R,) float32 from logits cond and uncond (R, V), any floating dtype, one device.

    logits = (c + guidance (c - u)) / softmax_temperature, in float32 (``uncond=None``: c / softmax_temperature);
    id = argmax(logits + tau gumbel(noise)), the lowest on ties; confidence = the id's logit without noise. noise:
    uniforms (R, V) in [0, 1], or a TokenNoise (seeds, tokens, step) for the rows. Formula:
    ``reference/sample_from_logits.py``.

    NaN, in a logit or a sum (inf - inf), counts as -inf; +inf wins, with confidence +inf; a row without any sum above
    -inf gives id 0 and confidence -inf. Uniforms that are NaN or outside [0, 1] give some id of the row.

    Inference only: the results carry no gradient, whatever the inputs. ``backend``: see ``_dispatch.choose``. Raises
    ValueError, before any work, for what does not fit together, for seeds below 0 and for tokens and steps that are no
    32-bit words (tokens and seeds on a GPU are not looked at, which would mean waiting for it).
    """
    check_rows(cond, uncond, "V")
    check_settings(guidance, softmax_temperature, tau)
    check_noise(noise, cond, cond.shape[1])
    uncond = None if uncond is None else uncond.detach()
    settings = (float(guidance), float(softmax_temperature), float(tau))
    return _sample_from_logits(cond.detach(), uncond, *Draw.of(noise), *settings, backend)


def _run(
    cond: Tensor,
    uncond: Tensor | None,
    uniforms: Tensor | None,
    seeds: Tensor | None,
    tokens: Tensor | None,
    step: int,
    guidance: float,
    softmax_temperature: float,
    tau: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    draw = Draw(uniforms, seeds, tokens, step).checked()
    settings = {"guidance": guidance, "softmax_temperature": softmax_temperature, "tau": tau}
    return choose("sample_from_logits", cond.device, backend).run(cond, uncond, draw, settings)


def _fake(cond: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return empty_choice(cond)


_sample_from_logits = define(
    "sample_from_logits(Tensor cond, Tensor? uncond, Tensor? uniforms, Tensor? seeds, Tensor? tokens, SymInt step, "
    "float guidance, float softmax_temperature, float tau, str? backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)


def _run_reference(
    cond: Tensor, uncond: Tensor | None, draw: Draw, settings: dict[str, float]
) -> tuple[Tensor, Tensor]:
    return reference.sample_from_logits(cond, uncond, noise=draw.noise(), **settings)


def run_native(cond: Tensor, uncond: Tensor | None, draw: Draw, settings: dict[str, float]) -> tuple[Tensor, Tensor]:
    """The C++ loop, which ``sample_tokens`` uses too: rows may lie apart, columns are made to lie side by side."""
    types = {x.dtype for x in (cond, uncond) if x is not None}
    if types != {torch.bfloat16}:
        cond, uncond = cond.float(), None if uncond is None else uncond.float()
    cond, uncond = (x if x is None or x.stride(1) == 1 else x.contiguous() for x in (cond, uncond))
    uniforms, seeds, tokens = (x if x is None else x.contiguous() for x in draw[:3])
    cond, uncond, uniforms, seeds, tokens = (
        x if x is None else _native.aligned(x) for x in (cond, uncond, uniforms, seeds, tokens)
    )
    ids, confidence = empty_choice(cond)
    _native.module().sample_from_logits(
        cond=cond.data_ptr(),
        uncond=_address(uncond),
        uniforms=_address(uniforms),
        seeds=_address(seeds),
        tokens=_address(tokens),
        ids=ids.data_ptr(),
        confidence=confidence.data_ptr(),
        rows=cond.shape[0],
        columns=cond.shape[1],
        cond_stride=cond.stride(0),
        uncond_stride=0 if uncond is None else uncond.stride(0),
        dtype="bfloat16" if cond.dtype is torch.bfloat16 else "float32",
        step=draw.step,
        num_threads=torch.get_num_threads(),
        **settings,
    )
    return ids, confidence


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _run_triton(cond: Tensor, uncond: Tensor | None, draw: Draw, settings: dict[str, float]) -> tuple[Tensor, Tensor]:
    from dcar_fast.kernels.sample_from_logits import sample_from_logits as kernel  # triton is loaded on use only

    with current(cond.device):
        return kernel(for_kernels(cond), for_kernels(uncond), **draw._asdict(), **settings)


register(
    "sample_from_logits",
    Backend("triton", _run_triton, triton_usable, launches=2),
    Backend("native", run_native, _native.cpu_usable),
    Backend("reference", _run_reference, everywhere),
)
