"""What the attention ops share: their types, and which of them the kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from dcar_fast.ops._dispatch import Backend, choose, requested

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
TYPES = (*KERNEL_TYPES, torch.float64)


def check_type(name: str, value: Tensor) -> None:
    if value.dtype not in TYPES:
        raise ValueError(f"{name} is {value.dtype}, allowed are {', '.join(map(str, TYPES))}")


def choose_for(op: str, value: Tensor, backend: str | None) -> Backend:
    """As ``_dispatch.choose``, for an input type: "auto" takes the reference for float64, which kernels do not have."""
    chosen = choose(op, value.device, backend)
    if chosen.name == "reference" or value.dtype in KERNEL_TYPES:
        return chosen
    if (requested() if backend is None else backend) == "auto":
        return choose(op, value.device, "reference")
    allowed = ", ".join(map(str, KERNEL_TYPES))
    raise ValueError(
        f"backend is {chosen.name!r}, which cannot run {op} on {value.dtype}: it takes {allowed}; use 'reference'"
    )
