"""Standard normals of the denoising steps from seeds, on the fastest backend there is."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.ops import _native
from dcar_fast.ops._checks import check_int64, check_same_device, check_tensor, check_values
from dcar_fast.ops._dispatch import Backend, choose, current, everywhere, register, triton_usable
from dcar_fast.ops._library import define
from dcar_fast.ops._sampling import LARGEST_WORD
from dcar_fast.reference import latent_noise as reference


def latent_noise(
    seeds: Tensor, tokens: Tensor, channels: int, step: int, *, initial: bool, backend: str | None = None
) -> Tensor:
    """(R, channels) float32 standard normals for seeds (R,) int64 and tokens (R,) int64, positions in their image.

    With ``initial`` and step 0 what ``noise.CounterNoise.latent_init()`` gives these rows, without it
    ``latent(step)``: the same random words, normals up to rounding.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together, for seeds
    below 0 and for tokens and steps that are no 32-bit words (tokens and seeds on a GPU are not looked at, which would
    mean waiting for it).
    """
    check_tensor("seeds", seeds, ("R",))
    check_int64("seeds", seeds)
    check_tensor("tokens", tokens, seeds.shape)
    check_int64("tokens", tokens)
    check_same_device("seeds", seeds, "tokens", tokens)
    if isinstance(channels, bool) or not isinstance(channels, int) or not 1 <= channels < 2**31:
        raise ValueError(f"channels is {channels!r}, allowed is an integer in 1..2^31-1")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= LARGEST_WORD:
        raise ValueError(f"step is {step!r}, allowed are 0..{LARGEST_WORD}")
    if not isinstance(initial, bool):
        raise ValueError(f"initial is {initial!r}, allowed are True and False")
    return _latent_noise(seeds, tokens, channels, step, initial, backend)


def _run(seeds: Tensor, tokens: Tensor, channels: int, step: int, initial: bool, backend: str | None) -> Tensor:
    return choose("latent_noise", seeds.device, backend).run(seeds, tokens, channels, step, initial=initial)


def _fake(seeds: Tensor, tokens: Tensor, channels: int, step: int, initial: bool, backend: str | None) -> Tensor:
    return seeds.new_empty(seeds.shape[0], channels, dtype=torch.float32)


_latent_noise = define(
    "latent_noise(Tensor seeds, Tensor tokens, SymInt channels, SymInt step, bool initial, str? backend) -> Tensor",
    _run,
    _fake,
)


def _run_reference(seeds: Tensor, tokens: Tensor, channels: int, step: int, *, initial: bool) -> Tensor:
    check_values("seeds", seeds, 2**63 - 1)  # the C++ kernel looks itself
    check_values("tokens", tokens, LARGEST_WORD)
    return reference.latent_noise(seeds, tokens, channels, step, initial=initial)


def _run_native(seeds: Tensor, tokens: Tensor, channels: int, step: int, *, initial: bool) -> Tensor:
    out = seeds.new_empty(seeds.shape[0], channels, dtype=torch.float32)
    seeds, tokens = (_native.aligned(x.contiguous()) for x in (seeds, tokens))
    _native.module().latent_noise(
        seeds=seeds.data_ptr(),
        tokens=tokens.data_ptr(),
        out=out.data_ptr(),
        rows=seeds.shape[0],
        channels=channels,
        step=step,
        initial=initial,
        num_threads=torch.get_num_threads(),
    )
    return out


def _run_triton(seeds: Tensor, tokens: Tensor, channels: int, step: int, *, initial: bool) -> Tensor:
    from dcar_fast.kernels.latent_noise import latent_noise as kernel  # triton is loaded on use only

    with current(seeds.device):
        return kernel(seeds, tokens, channels, step, initial=initial)


register(
    "latent_noise",
    Backend("triton", _run_triton, triton_usable, launches=1),
    Backend("native", _run_native, _native.cpu_usable),
    Backend("reference", _run_reference, everywhere),
)
