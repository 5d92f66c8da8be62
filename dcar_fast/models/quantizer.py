"""Vector quantiser on the unit sphere, with the residual that the hybrid path adds back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.reference.vq_lookup import vq_lookup

Lookup = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Tokens:
    """What the tokenizer makes of images; everything but the ids is float32.

    ids (B, h, w) int64; quantized (B, C, h, w): normalised codes, with the straight-through gradient to the features;
    features (B, C, h, w): normalised encoder output; residual (B, h*w, C) = features - quantized, detached;
    losses: scalars "commitment_loss" (its weight 0.25 included), "codebook_loss", "quantizer_loss" (their sum).
    """

    ids: Tensor
    quantized: Tensor
    features: Tensor
    residual: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module):
    """Nearest code by cosine, lowest index on ties, always in float32 (TF32 or bfloat16 would flip indices).

    ``lookup(z (M, C), codebook (V, C)) -> ids, codes, residual`` normalises both sides itself; the default is the
    reference, the pipeline and the trainers pass a faster one.
    """

    COMMITMENT = 0.25

    def __init__(self, codebook_size: int, channels: int, lookup: Lookup = vq_lookup) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        self.lookup = lookup

    def _apply(self, fn, recurse: bool = True):
        """Moves along with ``.to(...)``, but the codes stay in float32 where others become half precision."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < tensor.dtype.itemsize else moved

        return super()._apply(keep_precision, recurse)

    def codes(self) -> Tensor:
        """The normalised codebook (V, C), float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def forward(self, z: Tensor) -> Tokens:
        """z (B, C, h, w), any float dtype -> Tokens."""
        batch, channels, height, width = z.shape
        with torch.autocast(z.device.type, enabled=False):
            rows = z.float().permute(0, 2, 3, 1).reshape(-1, channels)  # (B h w, C)
            weight = self.embedding.weight.float()
            with torch.no_grad():
                ids, codes, residual = self.lookup(rows.detach(), weight.detach())
            features = F.normalize(rows, dim=-1)
            if torch.is_grad_enabled() and weight.requires_grad:
                codes = F.embedding(ids, self.codes())  # the same values, with a gradient to the codebook
            commitment = self.COMMITMENT * F.mse_loss(features, codes.detach())
            codebook = F.mse_loss(codes, features.detach())
            # codes + 0, so that the values stay exactly the codes while the gradient goes to the features
            quantized = codes.detach() + (features - features.detach())

        def image(rows: Tensor) -> Tensor:
            return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)

        return Tokens(
            ids=ids.view(batch, height, width),
            quantized=image(quantized),
            features=image(features),
            residual=residual.view(batch, height * width, channels),
            losses={
                "commitment_loss": commitment,
                "codebook_loss": codebook,
                "quantizer_loss": commitment + codebook,
            },
        )
