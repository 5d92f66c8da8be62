"""Linear layers laid out once for the device that runs them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast import ops

ROWS = 512  # what oneDNN lays float32 weights out for; any other number of rows works as well


class Linear:
    """x -> act(x W^T + b) for x (..., inputs), in one precision.

    On a CPU in float32 the weight is kept in oneDNN's blocked layout, which is what makes it faster than ``F.linear``;
    everywhere else it is a plain matrix product. Of a slice of rows of a weight (q, k and v of one matrix) a Linear of
    its own is made: a blocked weight cannot be cut.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype).contiguous()
        self.blocked = blocks(self.weight)
        if self.blocked:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS)

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype) -> Linear:
        return cls(layer.weight, layer.bias, dtype)

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        if self.blocked:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            y = F.linear(x, self.weight, self.bias)
        return ops.gelu(y, backend="auto") if gelu else y  # oneDNN's own takes longer in the product than this after it


def blocks(weight: Tensor) -> bool:
    """Whether the blocked layout serves this weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
