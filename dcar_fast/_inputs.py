"""What users pass: devices and seeds, checked before any work."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from dcar_fast.noise import check_seeds, is_seed


def check_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, None meaning the CPU; ``ValueError`` for one that is not there."""
    try:
        device = torch.device("cpu" if device is None else device)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device!s} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def image_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per image: seed + b from one integer, a list as it is, a random start from None."""
    if seed is None:
        seed = secrets.randbelow(2**32)
    if is_seed(seed):
        return check_seeds([int(seed) + i for i in range(count)])
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        raise ValueError(f"seed must be an integer or a list of integers, got {type(seed).__name__}")
    if len(seed) != count:
        raise ValueError(f"seed: {len(seed)} seeds came for {count} prompts")
    return check_seeds(seed)
