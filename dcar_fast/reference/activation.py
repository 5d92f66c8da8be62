"""The activations of the autoencoder, by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}


def activate(x: Tensor, activation: str) -> Tensor:
    """``x`` after "none", "relu" or "silu"."""
    return ACTIVATIONS[activation](x)
