"""The fused engine with qkv, fc1 and fc2 of every block in float8: 11 launches a block, 10 with absorbed projections.

Rows of activations and of weights have a scale each (``ops.quantize_rows``), which the products take back out of their
float32 sums (``ops.fused_linear``). Everything else is bfloat16: text, attention, the other projections, both heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dcar_fast.engine.fused import FusedBlock, FusedEngine, Stream
from dcar_fast.models.dcar import DCAR
from dcar_fast.ops import fused_linear, quantize_rows

FLOAT8 = torch.float8_e4m3fn


class Float8Layer(NamedTuple):
    """A linear layer: weight (V, K) float8, scale (V,) float32, bias (V,)."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype, backend: str | None) -> Float8Layer:
        """From the model's own precision: rounded once."""
        values, scales = quantize_rows(layer.weight.detach()[None], backend=backend)
        return cls(values[0], scales[0], layer.bias.detach().to(dtype))


class Float8Block(FusedBlock):
    """A block whose large layers take one launch more, which makes float8 of their input."""

    def pack_large(self, qkv: nn.Linear, fc1: nn.Linear, fc2: nn.Linear, dtype: torch.dtype) -> None:
        self.qkv, self.fc1, self.fc2 = (Float8Layer.of(layer, dtype, self.backend) for layer in (qkv, fc1, fc2))

    def normed(self, stream: Stream, layer: Float8Layer, **how):
        return self.plain(stream.x, layer, moments=stream.moments, **how)

    def plain(self, x: Tensor, layer: Float8Layer, moments: Tensor | None = None, **how):
        values, x_scale = quantize_rows(x, moments=moments, backend=self.backend)
        scales = {"x_scale": x_scale, "weight_scale": layer.scale}
        return fused_linear(values, layer.weight, layer.bias, **scales, out_dtype=x.dtype, backend=self.backend, **how)


class Float8Engine(FusedEngine):
    """``backend``: "triton", or "reference", which emulates it in plain PyTorch. dtype: of everything else."""

    block = Float8Block

    def __init__(self, model: DCAR, backend: str, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(model, dtype, backend)
