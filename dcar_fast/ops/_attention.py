"""What the attention ops share: their types, and which of them the kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
TYPES = (*KERNEL_TYPES, torch.float64)


def check_type(name: str, value: Tensor) -> None:
    if value.dtype not in TYPES:
        raise ValueError(f"{name} is {value.dtype}, allowed are {', '.join(map(str, TYPES))}")
