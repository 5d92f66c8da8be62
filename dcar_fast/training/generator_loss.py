"""The module that the generator's processes share: generator and text encoder in, losses out; and what it is fed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcar_fast.models.dcar import DCAR
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.reference.diffusion import TRAINING_STEPS
from dcar_fast.training.losses import diffusion_loss, token_loss
from dcar_fast.training.task import Draws

INPUTS_AND_OUTPUTS = ("generator.to_logits.", "generator.head.input_proj.", "generator.head.final_layer.")


class GeneratorLoss(nn.Module):
    """The generator, the text encoder if it is trained along, and their loss.

    In training mode too the encoder has no dropout: its random numbers would depend on how the batch is split.
    """

    def __init__(self, generator: DCAR, text_encoder: TextEncoder | None = None) -> None:
        super().__init__()
        self.generator, self.text_encoder = generator, text_encoder

    def train(self, mode: bool = True) -> GeneratorLoss:
        super().train(mode)
        if self.text_encoder is not None:
            self.text_encoder.eval()
        return self

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights of the linear layers between hidden states, which Muon is for: those that read codes or residuals
        and those that predict them keep AdamW."""
        linear = {name for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        chosen = {f"{name}.weight" for name in linear if not f"{name}.".startswith(INPUTS_AND_OUTPUTS)}
        return [parameter for name, parameter in self.named_parameters() if name in chosen]

    def forward(
        self,
        ids: Tensor,
        residual: Tensor,
        text: Tensor,
        text_mask: Tensor,
        masked: Tensor,
        dropped: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        total_weight: float,
        total_masked: int,
        share: float,
        label_smoothing: float,
        unmasked_weight: float,
    ) -> dict[str, Tensor]:
        """Losses of b rows, normalised so that those of all rows of the global batch add up to its mean.

        ids (b, N) int64, residual (b, N, C); text: token ids (b, T) int64 where the encoder is trained, else states
        (b, T, Dt); text_mask (b, T) bool; masked (b, N) and dropped (b,) bool; timesteps (m b N,) and noise (m b N, C),
        tiled. Of the global batch: total_weight, see :func:`token_weight`; total_masked, its masked tokens; share, b
        over its rows. Returns scalars "token_loss", "diffusion_loss" and, without gradient, "masked_accuracy": of the
        masked tokens, those whose most likely code is right.
        """
        config = self.generator.config
        with attention_of_training(ids.device):
            states = text if self.text_encoder is None else self.text_encoder.encode(text, text_mask)
            output = self.generator(ids.masked_fill(masked, config.mask_id), states, text_mask, dropped)
        tokens = token_loss(
            output.logits,
            ids,
            masked,
            label_smoothing=label_smoothing,
            unmasked_weight=unmasked_weight,
            total_weight=total_weight,
        )
        diffusion = diffusion_loss(
            self.generator.head,
            output.hidden,
            residual,
            scale=config.head_scale,
            multiplier=config.head_batch_multiplier,
            timesteps=timesteps,
            noise=noise,
        )
        with torch.no_grad():
            right = (output.logits.argmax(dim=-1) == ids) & masked
        accuracy = right.sum() / total_masked
        return {"token_loss": tokens, "diffusion_loss": diffusion * share, "masked_accuracy": accuracy}


def attention_of_training(device: torch.device) -> AbstractContextManager:
    """How attention is computed: on a CPU by plain products, whose gradients take a fraction of the time that those of
    PyTorch's fused CPU kernel take at these lengths; elsewhere as PyTorch chooses."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def diffusion_draws(draws: Draws, multiplier: int, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """timesteps (m b N,) int64 in 0..999 and noise (m b N, C) of this micro-batch's b rows, tiled.

    Every row of the global batch has a generator of its own, so that a process draws for its own rows only.
    """
    timesteps, noise = [], []
    for row in range(draws.start, draws.start + draws.count):
        generator = draws.generator(f"diffusion/{row}")
        timesteps.append(torch.randint(TRAINING_STEPS, (multiplier, tokens), generator=generator))
        noise.append(torch.randn(multiplier, tokens, channels, generator=generator))
    return torch.stack(timesteps, dim=1).flatten(), torch.stack(noise, dim=1).flatten(0, 2)  # (m, b, N, ...)
