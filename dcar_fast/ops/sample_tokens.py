"""The logits head and guided Gumbel-max sampling in one."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.noise import TokenNoise
from dcar_fast.ops._checks import check_floating, check_same_device, check_tensor
from dcar_fast.ops._dispatch import Backend, choose, everywhere, register
from dcar_fast.ops._sampling import check_noise, check_rows, check_settings
from dcar_fast.reference import sample_tokens as reference


@torch.no_grad()
def sample_tokens(
    cond: Tensor,
    uncond: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    guidance: float,
    softmax_temperature: float,
    tau: float,
    noise: Tensor | TokenNoise,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """ids (R,) int64 and confidence (R,) float32 from normed hidden states cond and uncond (R, D).

    logits = hidden @ weight (V, D)^T + bias (V,) of each branch, accumulated in float32; all else is
    ``sample_from_logits``. Any floating dtypes, one device. No gradient. Formula: ``reference/sample_tokens.py``.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together.
    """
    check_rows(cond, uncond, "D")
    check_tensor("weight", weight, ("V", cond.shape[1]))
    check_floating("weight", weight)
    if not weight.shape[0]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, allowed is at least one row")
    check_tensor("bias", bias, (weight.shape[0],))
    check_floating("bias", bias)
    check_same_device("cond", cond, "weight", weight)
    check_same_device("cond", cond, "bias", bias)
    check_settings(guidance, softmax_temperature, tau)
    check_noise(noise, cond, weight.shape[0])
    settings = {"guidance": guidance, "softmax_temperature": softmax_temperature, "tau": tau, "noise": noise}
    return choose("sample_tokens", cond.device, backend).run(cond, uncond, weight, bias, **settings)


register("sample_tokens", Backend("reference", reference.sample_tokens, everywhere))
