"""Training of the generator: masked cross-entropy on the tokens, diffusion loss on the residuals.

The tokenizer is frozen; so is a T5 text encoder, while an encoder on bytes is trained along. Every random number is a
function of seed, step and row, and the losses are normalised by the global batch: processes and accumulation change
nothing but the rounding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from dcar_fast.checkpoints import save_folder
from dcar_fast.config import PipelineConfig
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.text_encoder import TextEncoder, upload
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.ops.vq_lookup import vq_lookup
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.generator_loss import GeneratorLoss, diffusion_draws
from dcar_fast.training.long_captions import SaidOnce
from dcar_fast.training.losses import random_token_mask, token_weight
from dcar_fast.training.optimizers import make_optimizer
from dcar_fast.training.previews import prompt_grid
from dcar_fast.training.task import Draws, Run, Task

if TYPE_CHECKING:
    from dcar_fast.training.settings import GeneratorTraining

MODULE = "generator"
PIXELS_AT_ONCE = 16 * 64 * 64  # that a CPU encodes together


class GeneratorTask(Task):
    """What ``dcar-fast train-generator`` trains.

    text_encoder is trained along if ``joint``, else frozen like the tokenizer. calibration: gives batches from whose
    residuals the scale is measured before the first step where ``settings.residual_scale`` is None. ``ValueError`` for
    models that do not fit together.
    """

    can_shard = True

    def __init__(
        self,
        settings: GeneratorTraining,
        tokenizer: DCHT,
        generator: DCAR,
        text_encoder: TextEncoder,
        *,
        joint: bool,
        calibration: Callable[[], Iterable[Batch]] | None = None,
    ) -> None:
        PipelineConfig(tokenizer.config, generator.config, text_encoder.config)  # checks that they fit
        self.settings, self.joint, self._calibration = settings, joint, calibration
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self._long_captions = SaidOnce()
        tokenizer.quantizer.lookup = vq_lookup
        self.frozen = {"tokenizer": tokenizer} if joint else {"tokenizer": tokenizer, "text_encoder": text_encoder}
        for module in self.frozen.values():
            module.eval().requires_grad_(False)
        text_encoder.requires_grad_(joint)
        generator.requires_grad_(True)
        self.trained = GeneratorLoss(generator, text_encoder if joint else None).train()
        self.modules = {MODULE: self.trained}
        self.averaged = (MODULE,)
        self.scale_known = settings.residual_scale is not None
        if self.scale_known:
            self._set_scale(settings.residual_scale)
        elif calibration is None:
            raise ValueError("calibration must give batches where residual_scale is None")

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Weight decay on the matrices of linear layers alone: not on biases, norms and embeddings."""
        muon = self.trained.hidden_matrices()
        return {MODULE: make_optimizer(self.trained, self.settings.optimizer, muon=muon)}

    def train_step(self, run: Run, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """ "loss" and its parts, "masked_accuracy" and "gradient_norm"."""
        if not self.scale_known:
            self._calibrate(run)  # here, as a resumed run gets the scale after the task is made
        module = self.modules[MODULE]
        sums: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            inputs = self._inputs(run.draws(micro), batch, run.device)
            with run.synchronised(module, last=micro == len(batches) - 1):
                with run.autocast():
                    values = module(**inputs)
                loss = values["token_loss"] + self.settings.diffusion_weight * values["diffusion_loss"]
                run.backward(loss * run.world_size)
            for name, value in {"loss": loss, **values}.items():
                # the logged mean over the processes is the global batch's sum of the parts
                sums[name] = sums.get(name, 0.0) + value.detach() * run.world_size
        sums["gradient_norm"] = run.update(MODULE)
        return sums

    def preview(self, run: Run) -> dict[str, Image.Image]:
        """Samples of the settings' prompts, each from its own fixed seed, by the reference engine."""
        prompts = list(self.settings.preview_prompts)
        if not prompts:
            return {}
        from dcar_fast.pipeline import DCARPipeline

        training = self.trained.training
        pipeline = DCARPipeline(
            self.tokenizer,
            self.trained.generator,
            self.text_encoder,
            engine="reference",
            sampling=self.settings.sampling,
        )
        images = pipeline(prompts, seed=list(range(len(prompts))), progress=False)
        self.trained.train(training)
        return {"samples": prompt_grid(images, prompts)}

    def export(self, folder: Path) -> None:
        """A pipeline folder that ``DCARPipeline.from_pretrained`` loads, stored in ``settings.export_dtype``."""
        parts = {"tokenizer": self.tokenizer, "generator": self.trained.generator, "text_encoder": self.text_encoder}
        generator, sampling = self.trained.generator, self.settings.sampling
        config = PipelineConfig(self.tokenizer.config, generator.config, self.text_encoder.config, sampling)
        dtype = getattr(torch, self.settings.export_dtype)
        if dtype != torch.float32:
            parts = {name: _copied(part, dtype) for name, part in parts.items()}
        save_folder(folder, parts, config, trained=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The residual scale, once it is known."""
        scale = self.trained.generator.config.head_scale
        return {"residual_scale": torch.tensor(scale, dtype=torch.float64)} if self.scale_known else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if "residual_scale" in state:
            self._set_scale(state["residual_scale"].item())
            self.scale_known = True

    def tokens(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """ids (b, N) int64 and residual (b, N, C) float32: the cache's, or what the tokenizer makes of the pictures."""
        if "ids" in batch.cached:
            ids, residual = batch.cached["ids"], batch.cached["residual"]
        elif batch.images is None:
            raise ValueError("a batch has neither pictures nor cached tokens")
        else:
            ids, residual = encode_images(self.tokenizer, batch.images, device)
        wanted = self.trained.generator.config.num_tokens
        if ids[0].numel() != wanted:
            raise ValueError(f"data: a picture has {ids[0].numel()} tokens, the model is for num_tokens = {wanted}")
        return ids.flatten(1).long().to(device), residual.float().to(device)

    def text(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids (b, T) int64 where the encoder is trained, else states (b, T, Dt); and the mask (b, T) bool."""
        if self.joint:
            with self._long_captions.applied():
                ids, mask, _ = self.text_encoder.prepare(batch.captions)
            return upload(ids, device), upload(mask, device)
        if "text_states" in batch.cached:
            states, mask = batch.cached["text_states"], batch.cached["text_mask"]
            longest = max(1, int(mask.sum(dim=1).max()))  # the cache pads them all to one length
            return states[:, :longest].float().to(device), mask[:, :longest].to(device)
        with torch.no_grad(), self._long_captions.applied():
            found = self.text_encoder(batch.captions)
        return found.states, found.mask

    def _inputs(self, draws: Draws, batch: Batch, device: torch.device) -> dict[str, Tensor | float]:
        """Arguments of :meth:`GeneratorLoss.forward`."""
        s, config = self.settings, self.trained.generator.config
        ids, residual = self.tokens(batch, device)
        if len(ids) != draws.count:
            raise ValueError(f"a batch has {len(ids)} rows instead of {draws.count}")
        text, text_mask = self.text(batch, device)
        masked = random_token_mask(draws.total, config.num_tokens, draws.generator("mask"))
        dropped = torch.rand(draws.total, generator=draws.generator("text_dropout")) < s.text_dropout
        timesteps, noise = diffusion_draws(
            draws, config.head_batch_multiplier, config.num_tokens, config.latent_channels
        )
        return {
            "ids": ids,
            "residual": residual,
            "text": text,
            "text_mask": text_mask,
            "masked": draws.rows(masked).to(device),
            "dropped": draws.rows(dropped).to(device),
            "timesteps": timesteps.to(device),
            "noise": noise.to(device),
            "total_weight": token_weight(masked, s.unmasked_weight),
            "total_masked": int(masked.sum()),
            "share": draws.count / draws.total,
            "label_smoothing": s.label_smoothing,
            "unmasked_weight": s.unmasked_weight,
        }

    def _calibrate(self, run: Run) -> None:
        """Measures the residual scale; the first process's value counts for all."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        scale = torch.zeros((), dtype=torch.float64, device=run.device)
        if not distributed or torch.distributed.get_rank() == 0:
            scale.fill_(residual_scale(self.tokens(batch, run.device)[1] for batch in self._calibration()))
        if distributed:
            torch.distributed.broadcast(scale, 0)
        self._set_scale(scale.item())
        self.scale_known = True

    def _set_scale(self, scale: float) -> None:
        generator = self.trained.generator
        generator.config = dataclasses.replace(generator.config, head_scale=float(scale))


@torch.no_grad()
def encode_images(tokenizer: DCHT, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """images (B, 3, H, W) uint8 -> ids (B, h, w) int64 and residual (B, h w, C) float32.

    Always in float32: a cache holds what is computed on the fly. On a CPU a few pictures at a time with the channels
    last, so that activations stay in its caches.
    """
    found = []
    few = max(1, PIXELS_AT_ONCE // images[0, 0].numel()) if device.type == "cpu" else len(images)
    with torch.autocast(device.type, enabled=False):
        for part in images.split(few):
            pixels = part.to(device).float() / 127.5 - 1
            tokens = tokenizer.encode(pixels.contiguous(memory_format=torch.channels_last))
            found.append((tokens.ids, tokens.residual))
    return torch.cat([ids for ids, _ in found]), torch.cat([residual for _, residual in found])


def residual_scale(residuals: Iterable[Tensor]) -> float:
    """The standard deviation of all numbers in ``residuals``, summed up in float64; ``ValueError`` for none, or 0."""
    count, total, squares = 0, 0.0, 0.0
    for residual in residuals:
        values = residual.double()
        count, total = count + values.numel(), total + values.sum().item()
        squares += values.square().sum().item()
    variance = squares / count - (total / count) ** 2 if count else 0.0
    if not variance > 0:
        raise ValueError(f"residual_scale: {count} residual values have no spread to measure")
    return variance**0.5


def _copied(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another precision on the CPU, whose text tokenizer is shared."""
    memo = {id(part.tokenizer): part.tokenizer} if isinstance(part, TextEncoder) else {}
    return copy.deepcopy(part, memo).to("cpu", dtype)
