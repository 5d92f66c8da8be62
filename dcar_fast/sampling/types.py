"""What goes into a sampler and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dcar_fast.config import DCARConfig
from dcar_fast.models._checks import check_ids, check_tensor


@dataclass(frozen=True)
class Known:
    """Tokens that are decided already (inpainting, variation).

    ids (B, N) int64 hold the MASK id (``config.mask_id``) where a token is open; all others come out bit-equal.
    residual (B, N, C) float32 are the residuals to keep, keep (B, N) bool says where (True: the given one bit-equal,
    False: a generated one); the default keeps the residual of every known token.
    """

    ids: Tensor
    residual: Tensor | None = None
    keep: Tensor | None = None

    def check(self, config: DCARConfig, batch: int) -> None:
        """``ValueError`` naming the field that does not fit."""
        check_ids("known.ids", self.ids, (batch, None), config.codebook_size + 1)
        shape = tuple(self.ids.shape)
        if self.residual is not None:
            check_tensor("known.residual", self.residual, (*shape, config.latent_channels), floating=True)
        if self.keep is not None:
            check_tensor("known.keep", self.keep, shape)
            if self.keep.dtype != torch.bool:
                raise ValueError(f"known.keep must be bool, got {self.keep.dtype}")
            if self.residual is None:
                raise ValueError("known.keep came without known.residual: there is nothing to keep")


@dataclass(frozen=True)
class StepTrace:
    """One unmasking step: its input ids (B, N) and the trunk's raw logits, [cond; uncond] rows (2B or B, N, V)."""

    ids_in: Tensor
    logits: Tensor


@dataclass
class Sample:
    """ids (B, N) int64, residual (B, N, C) float32, and the steps if a trace was asked for."""

    ids: Tensor
    residual: Tensor
    trace: list[StepTrace] = field(default_factory=list)
