"""Guided Gumbel-max sampling of one token per row from given logits."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.noise import TokenNoise
from dcar_fast.ops._dispatch import Backend, choose, everywhere, register
from dcar_fast.ops._sampling import check_noise, check_rows, check_settings
from dcar_fast.reference import sample_from_logits as reference


@torch.no_grad()
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
    uniforms (R, V), or a TokenNoise (seeds, tokens, step) for the rows. NaN logits count as -inf; a row without any
    logit above -inf gives id 0 and confidence -inf. No gradient. Formula: ``reference/sample_from_logits.py``.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together.
    """
    check_rows(cond, uncond, "V")
    check_settings(guidance, softmax_temperature, tau)
    check_noise(noise, cond, cond.shape[1])
    settings = {"guidance": guidance, "softmax_temperature": softmax_temperature, "tau": tau, "noise": noise}
    return choose("sample_from_logits", cond.device, backend).run(cond, uncond, **settings)


register("sample_from_logits", Backend("reference", reference.sample_from_logits, everywhere))
