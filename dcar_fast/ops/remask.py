"""Confidence-based re-masking."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.ops._checks import check_floating, check_int64, check_same_device, check_tensor, check_values
from dcar_fast.ops._dispatch import Backend, choose, everywhere, register
from dcar_fast.reference import remask as reference


def remask(ids: Tensor, confidence: Tensor, num_masked: Tensor, mask_id: int, *, backend: str | None = None) -> Tensor:
    """ids (B, N) int64 with exactly ``num_masked[b]`` positions of row b replaced by ``mask_id``.

    Positions are ranked by (confidence, index), ascending, NaN below everything; the lowest are replaced. confidence
    (B, N) floating point, num_masked (B,) int64 in 0..N, all on one device. Formula: ``reference/remask.py``.

    ``backend``: see ``_dispatch.choose``. Raises ValueError, before any work, for what does not fit together; the
    values of ``num_masked`` are looked at on the CPU only, on a GPU that would mean waiting for it.
    """
    check_tensor("ids", ids, ("B", "N"))
    check_int64("ids", ids)
    check_tensor("confidence", confidence, ids.shape)
    check_floating("confidence", confidence)
    check_tensor("num_masked", num_masked, (ids.shape[0],))
    check_int64("num_masked", num_masked)
    check_values("num_masked", num_masked, ids.shape[1])
    check_same_device("ids", ids, "confidence", confidence)
    check_same_device("ids", ids, "num_masked", num_masked)
    if not isinstance(mask_id, int):
        raise ValueError(f"mask_id is a {type(mask_id).__name__}, allowed is an integer")
    with torch.no_grad():
        return choose("remask", ids.device, backend).run(ids, confidence, num_masked, mask_id)


register("remask", Backend("reference", reference.remask, everywhere))
