"""The tokenizer as a stage trains it: which parts learn, which path each picture takes, and the reconstruction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar_fast.models.tokenizer import DCHT
from dcar_fast.ops.vq_lookup import vq_lookup
from dcar_fast.training.sync_batch_norm import convert_batch_norm

STAGES = ("continuous", "discrete", "alternate")


class StagedTokenizer(nn.Module):
    """A DCHT in one of the three stages of training.

    - continuous: reconstruct decode(normalise(z)); encoder and decoder learn, the quantiser is neither called nor
      changed.
    - discrete: decode(straight-through codes); everything learns.
    - alternate: each picture takes either path; the decoder alone learns, encoder and quantiser are frozen (no
      gradient, eval mode).

    The decoder's BatchNorm has the statistics of all processes; the codes are found by the fast lookup.
    """

    def __init__(self, dcht: DCHT, stage: str) -> None:
        super().__init__()
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
        dcht.quantizer.lookup = vq_lookup
        self.dcht, self.stage = convert_batch_norm(dcht), stage
        dcht.requires_grad_(True)
        if stage == "alternate":
            dcht.encoder.requires_grad_(False)
        if stage != "discrete":
            dcht.quantizer.requires_grad_(False)
        self.train()

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the decoder's last convolution."""
        layer = self.dcht.decoder.project_out
        return layer.weight if isinstance(layer, nn.Conv2d) else layer.conv.weight

    def train(self, mode: bool = True) -> StagedTokenizer:
        super().train(mode)
        if self.stage == "alternate":
            self.dcht.encoder.eval()
            self.dcht.quantizer.eval()
        return self

    def forward(self, images: Tensor, continuous: Tensor) -> dict[str, Tensor]:
        """images (B, 3, H, W) float in [-1, 1]; continuous (B,) bool: which pictures skip the codes, all of them in the
        continuous stage whatever it says.

        Returns "reconstruction" (B, 3, H, W) float32, "features" (B h w, C) float32, the normalised encoder outputs
        without gradient, and, but for the continuous stage, "ids" (B, h, w) int64 and the scalar "quantizer_loss".
        """
        if self.stage == "continuous":
            latents = F.normalize(self.dcht.encoder(images).float(), dim=1)
            return self._outputs(latents, latents)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == "discrete"):
            tokens = self.dcht.encode(images)
        latents = torch.where(continuous[:, None, None, None], tokens.features, tokens.quantized)
        found = self._outputs(latents, tokens.features)
        return found | {"ids": tokens.ids, "quantizer_loss": tokens.losses["quantizer_loss"]}

    def _outputs(self, latents: Tensor, features: Tensor) -> dict[str, Tensor]:
        rows = features.detach().permute(0, 2, 3, 1).flatten(0, 2)
        return {"reconstruction": self.dcht.decode(latents).float(), "features": rows}


@torch.no_grad()
def reconstructions(dcht: DCHT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Hybrid and discrete reconstruction of images (B, 3, H, W) float in [-1, 1], in eval mode, modes restored."""
    modes = {module: module.training for module in dcht.modules()}
    dcht.eval()
    try:
        tokens = dcht.encode(images)
        return dcht.decode(tokens.features).float(), dcht.decode(tokens.quantized).float()
    finally:
        for module, mode in modes.items():
            module.training = mode


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """(B,) PSNR in dB of images clamped to [-1, 1] against references, at most 100."""
    error = (images.clamp(-1, 1) - references).square().flatten(1).mean(dim=1)
    return -10 * torch.log10((error / 4).clamp(min=1e-10))
