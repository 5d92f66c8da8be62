"""The tanh-approximated GELU of the transformer's MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), any shape and floating type; contiguous."""
    return F.gelu(x, approximate="tanh").contiguous()
