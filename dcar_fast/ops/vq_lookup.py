"""Nearest code of a codebook by cosine, on the fastest backend there is."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.ops import _native
from dcar_fast.ops._checks import check_codebook, check_floating, check_same_device, check_tensor
from dcar_fast.ops._dispatch import Backend, choose, everywhere, register
from dcar_fast.reference import vq_lookup as reference


def vq_lookup(z: Tensor, codebook: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Looks up the rows of z (M, C) in codebook (V, C); any floating dtype, both on one device, M may be 0.

    Both sides are L2-normalised inside, x / max(|x|, 1e-12), always in float32 (formula: ``reference/vq_lookup.py``):

        ids       (M,)    int64: the code with the largest cosine, the lowest index on ties; equal codes tie exactly
        codes     (M, C)  float32: normalise(codebook)[ids]
        residual  (M, C)  float32: normalise(z) - codes

    A row that holds NaN gets id 0 and a residual of NaN; a code that holds NaN is never chosen unless all do. The
    outputs carry no gradient, whatever the inputs: a quantiser adds its own straight-through estimator.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together.
    """
    check_tensor("z", z, ("M", "C"))
    check_floating("z", z)
    check_codebook(codebook, z.shape[1])
    check_same_device("z", z, "codebook", codebook)
    return choose("vq_lookup", z.device, backend).run(z.detach().float(), codebook.detach().float())


def _run_native(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z, codebook = z.contiguous(), codebook.contiguous()
    ids = torch.empty(z.shape[0], dtype=torch.int64)
    codes, residual = torch.empty_like(z), torch.empty_like(z)
    _native.module().vq_lookup(
        z=z.data_ptr(),
        codebook=codebook.data_ptr(),
        ids=ids.data_ptr(),
        codes=codes.data_ptr(),
        residual=residual.data_ptr(),
        rows=z.shape[0],
        num_codes=codebook.shape[0],
        channels=z.shape[1],
        num_threads=torch.get_num_threads(),
    )
    return ids, codes, residual


register(
    "vq_lookup",
    Backend("native", _run_native, _native.cpu_usable),
    Backend("reference", reference.vq_lookup, everywhere),
)
