"""Training of the tokenizer in its three stages: reconstruction, perceptual, adversarial and codebook losses.

A step is a function of the global batch: random numbers, losses, BatchNorm statistics, the adaptive weight and code
replacement are the same for any number of processes. Under gradient accumulation BatchNorm and the adaptive weight see
one micro-batch (over all processes) at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dcar_fast.checkpoints import save_tokenizer
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.training.codebook import CodebookUsage, codebook_statistics, replace_codes
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.discriminator import PatchDiscriminator, adaptive_weight, adversarial_loss, hinge_loss
from dcar_fast.training.grids import image_grid, pixels_to_images
from dcar_fast.training.optimizers import make_optimizer
from dcar_fast.training.perceptual import load_perceptual
from dcar_fast.training.sync_batch_norm import rows_of_all_processes, sum_over_processes
from dcar_fast.training.task import Draws, Run, Task
from dcar_fast.training.tokenizer_model import StagedTokenizer, psnr, reconstructions

if TYPE_CHECKING:
    from dcar_fast.training.settings import TokenizerTraining

log = logging.getLogger(__name__)

TOKENIZER, DISCRIMINATOR = "tokenizer", "discriminator"
DISCRIMINATOR_EPSILON = 1e-6
"""Adam's. The hinge loss hands the last bias 1/2 - 1/2 while no logit is beyond the hinge: with the usual 1e-8 its
steps would be made of rounding errors, which depend on how the batch is split."""


class TokenizerTask(Task):
    """What ``dcar-fast train-tokenizer`` trains.

    dcht is trained in place. preview_images (K, 3, H, W) uint8: held-out pictures that :meth:`preview` reconstructs.
    measured: gives pictures (B, 3, H, W) uint8 on which an export's residuals are measured. fill_codebook: at the start
    replace the codes by encoder outputs (discrete stage only); until all are, the steps are continuous ones.
    """

    def __init__(
        self,
        settings: TokenizerTraining,
        dcht: DCHT,
        *,
        preview_images: Tensor,
        measured: Callable[[], Iterable[Tensor]],
        fill_codebook: bool = False,
    ) -> None:
        self.settings, self.dcht, self._measured = settings, dcht, measured
        self._preview_images = preview_images
        self.staged = StagedTokenizer(dcht, settings.stage)
        self.modules = {TOKENIZER: self.staged}
        self.averaged = (TOKENIZER,)
        self.frozen = {}
        if settings.gan_weight:
            self.modules[DISCRIMINATOR] = PatchDiscriminator(
                settings.discriminator_width, settings.discriminator_layers
            )
        self.perceptual = load_perceptual(settings.lpips_weights, settings.lpips_weight)
        if self.perceptual is not None:
            self.frozen["perceptual"] = self.perceptual
        elif settings.lpips_weight:
            log.warning(
                "perceptual loss (LPIPS) is off: lpips_weights names no local file of VGG-16 or AlexNet weights"
            )
        self.fill_codebook = fill_codebook and settings.stage == "discrete"
        self.usage = CodebookUsage(dcht.config.codebook_size)
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """AdamW on what the stage trains; weight decay on convolution weights alone: not on biases, norms, codes."""
        s = self.settings
        self._optimizers = {TOKENIZER: make_optimizer(self.staged, s.optimizer)}
        if DISCRIMINATOR in self.modules:
            self._optimizers[DISCRIMINATOR] = make_optimizer(
                self.modules[DISCRIMINATOR], s.discriminator, epsilon=DISCRIMINATOR_EPSILON
            )
        return dict(self._optimizers)

    def train_step(self, run: Run, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """ "loss" and its parts, "psnr" (mean over the pictures, in dB), of the codes "codebook_usage",
        "codebook_perplexity" and "dead_codes" (see :class:`CodebookUsage`), and the norms of the gradients."""
        filling = self._is_filling(run, batches)
        sums: dict[str, Tensor] = {}
        features, ids = [], []
        for micro, batch in enumerate(batches):
            values, found = self._micro_batch(run, run.draws(micro), batch, micro == len(batches) - 1, filling)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / len(batches)
            features.append(found["features"])
            ids.append(found.get("ids"))
        sums["gradient_norm"] = run.update(TOKENIZER)
        if self._adversarial(run):
            sums["discriminator_gradient_norm"] = run.update(DISCRIMINATOR)
        if self.settings.stage != "continuous":
            sums |= self._look_after_codes(run, features, torch.cat([i.flatten() for i in ids]), filling)
        return sums

    def _micro_batch(
        self, run: Run, draws: Draws, batch: Batch, last: bool, filling: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adds the gradients of one micro-batch; its metrics, means over its rows, and what the tokenizer gave."""
        s = self.settings
        images = self._images(batch, draws, run.device)
        continuous = self._paths(draws, filling).to(run.device)
        tokenizer = self.modules[TOKENIZER]
        with run.synchronised(tokenizer, last):
            with run.autocast():
                found = tokenizer(images, continuous)
            generated = found["reconstruction"]
            values, gradient = self._image_losses(run, generated, images)
            # the losses' gradients at the pictures are known: this scalar hands them on to the decoder
            surrogate = (generated * gradient).sum()
            if s.stage == "discrete":
                weight = 0.0 if filling else s.quantizer_weight
                values["quantizer"] = found["quantizer_loss"].detach()
                values["loss"] = values["loss"] + weight * values["quantizer"]
                surrogate = surrogate + weight * found["quantizer_loss"]
            run.backward(surrogate * (draws.count / draws.total * run.world_size))
        if self._adversarial(run):
            values["discriminator"] = self._train_discriminator(run, draws, images, generated.detach(), last)
        values["psnr"] = psnr(generated.detach(), images).mean()
        return values, found

    def _image_losses(self, run: Run, generated: Tensor, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The losses on the pictures, means over the rows, and the gradient of their sum at ``generated``."""
        s = self.settings
        pixels = generated.detach().requires_grad_()
        compare = F.mse_loss if s.reconstruction == "mse" else F.l1_loss
        loss = compare(pixels, images)
        values = {"reconstruction": loss.detach()}
        if self.perceptual is not None:
            with run.autocast():
                distance = self.perceptual(pixels, images)
            values["perceptual"] = distance.detach()
            loss = loss + s.lpips_weight * distance
        (gradient,) = torch.autograd.grad(loss, pixels)
        total = loss.detach()
        if self._adversarial(run):
            with run.autocast():
                # not as wrapped: its parameters' gradients are not wanted here
                logits = unwrapped(self.modules[DISCRIMINATOR])(pixels)
            fooling = adversarial_loss(logits)
            (at_pixels,) = torch.autograd.grad(fooling, pixels)
            adaptive = adaptive_weight(generated, self.staged.last_weight, gradient, at_pixels)
            gradient = gradient + s.gan_weight * adaptive * at_pixels
            values |= {"adversarial": fooling.detach(), "adaptive_weight": adaptive}
            total = total + s.gan_weight * adaptive * fooling.detach()
        return {"loss": total, **values}, gradient

    def _train_discriminator(self, run: Run, draws: Draws, images: Tensor, generated: Tensor, last: bool) -> Tensor:
        discriminator = self.modules[DISCRIMINATOR]
        with run.synchronised(discriminator, last):
            with run.autocast():
                logits = discriminator(torch.cat([images, generated]))
            loss = hinge_loss(*logits.chunk(2))
            run.backward(loss * (draws.count / draws.total * run.world_size))
        return loss.detach()

    def _look_after_codes(self, run: Run, features: list[Tensor], ids: Tensor, filling: bool) -> dict[str, Tensor]:
        """Counts the codes' use, and replaces codes at the start or when they are dead and the settings say so."""
        s, done = self.settings, run.step + 1
        usage = self.usage.to(ids.device)
        counts = sum_over_processes(ids.bincount(minlength=self.dcht.config.codebook_size))
        metrics = usage.update(counts, run.step)
        every = s.restart_dead_codes_after
        if filling:
            codes = self.dcht.config.codebook_size
            rows = sum(len(part) for part in features) * run.world_size
            first = run.step * rows
            wanted, length = torch.arange(first, min(first + rows, codes), device=ids.device), 1.0
        elif s.stage == "discrete" and every and done % every == 0:
            wanted = usage.unused(done, every)
            norms = self.dcht.quantizer.embedding.weight.detach().norm(dim=1)
            alive = usage.last_used > done - every
            length = (norms * alive).sum() / alive.sum()  # their step in angle is then that of the others
        else:
            wanted, length = counts.new_empty(0), 1.0
        if len(wanted):
            # in the global batch's row order: micro-batches, in each the processes
            candidates = torch.cat([rows_of_all_processes(part) for part in features])
            weight, optimizer = self.dcht.quantizer.embedding.weight, self._optimizers[TOKENIZER]
            generator = run.draws(0).generator("codes")
            usage.mark(replace_codes(weight, wanted, candidates, optimizer, generator, length), done)
        if every and s.stage == "discrete":
            metrics["restarted_codes"] = metrics["dead_codes"].new_tensor(float(len(wanted)))
        return metrics

    def _is_filling(self, run: Run, batches: Sequence[Batch]) -> bool:
        """Whether this step still puts encoder outputs in place of the initial codes."""
        if not self.fill_codebook:
            return False
        cells = batches[0].images[0, 0].numel() // self.dcht.config.compression**2
        return run.step < math.ceil(self.dcht.config.codebook_size / (cells * run.draws(0).total))

    def _paths(self, draws: Draws, filling: bool) -> Tensor:
        """(b,) bool: pictures that are reconstructed from their features instead of their codes."""
        if self.settings.stage == "alternate":
            return draws.rows(torch.rand(draws.total, generator=draws.generator("path")) < 0.5)
        return torch.full((draws.count,), filling or self.settings.stage == "continuous")

    def _adversarial(self, run: Run) -> bool:
        return DISCRIMINATOR in self.modules and run.step >= self.settings.gan_start

    def _images(self, batch: Batch, draws: Draws, device: torch.device) -> Tensor:
        if batch.images is None:
            raise ValueError("the tokenizer is trained on pictures: a cache of tokens has none")
        if len(batch.images) != draws.count:
            raise ValueError(f"a batch has {len(batch.images)} rows instead of {draws.count}")
        return pixels_to_images(batch.images, device)

    def preview(self, run: Run) -> dict[str, Image.Image]:
        """ "reconstructions": the held-out pictures, then their hybrid and their discrete reconstruction."""
        if not len(self._preview_images):
            return {}
        images = pixels_to_images(self._preview_images, run.device)
        rows = [("original", images)]
        for name, made in zip(("hybrid", "discrete"), reconstructions(self.dcht, images), strict=True):
            rows.append((f"{name} {psnr(made, images).mean():.2f} dB", made))
        return {"reconstructions": image_grid(rows)}

    def export(self, folder: Path) -> None:
        """A folder that :func:`dcar_fast.checkpoints.load_tokenizer` takes. config.json's details name the stage and,
        once there are codes, what :func:`codebook_statistics` measures, "residual_std" among it."""
        details = {"stage": self.settings.stage}
        if self.settings.stage != "continuous":
            details |= codebook_statistics(self.dcht, (pixels_to_images(images) for images in self._measured()))
        save_tokenizer(folder, self.dcht, details)

    def state_dict(self) -> dict[str, Tensor]:
        return self.usage.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.usage.load_state_dict(state)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
