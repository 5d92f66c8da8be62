"""A tiny tokenizer with its settings, and a run without a loop, alone or under gloo, for the tests of its trainer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcar_fast.config import DCHTConfig
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.settings import TokenizerTraining
from dcar_fast.training.task import Draws
from dcar_fast.training.tokenizer import TokenizerTask

SIZE, GLOBAL_BATCH = 16, 4


def config(**changes: Any) -> DCHTConfig:
    """4x compression, 8 channels; BatchNorm in the decoder's first two stages, like the full-size model."""
    values = {
        "codebook_size": 24,
        "latent_channels": 8,
        "widths": (16, 16, 32),
        "encoder_depths": (0, 1, 1),
        "decoder_depths": (0, 1, 1),
        "blocks": ("res", "res", "efficientvit"),
        "decoder_norms": ("batch_norm", "batch_norm", "layer_norm"),
        "decoder_acts": ("relu", "relu", "silu"),
    }
    return DCHTConfig(**{**values, **changes})


def dcht(**changes: Any) -> DCHT:
    """Random weights; codes of unit length, so that the nearest ones differ between cells."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DCHT(config(**changes))
        nn.init.normal_(model.quantizer.embedding.weight)
    return model


def settings(stage: str = "discrete", **changes: Any) -> TokenizerTraining:
    values: dict[str, Any] = {
        "run": {"output": "unused", "steps": 10, "batch_size": GLOBAL_BATCH},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01},
        "discriminator": {"learning_rate": 1e-3, "weight_decay": 0.0},
        "stage": stage,
        "initial": "" if stage == "continuous" else "unused",
        "lpips_weight": 0.0,
        "gan_weight": 0.0,
        "discriminator_width": 8,
        "discriminator_layers": 1,
    }
    return TokenizerTraining.from_dict({**values, **changes})


def pictures(count: int = GLOBAL_BATCH, seed: int = 0, size: int = SIZE) -> Tensor:
    """(count, 3, size, size) uint8: two random colours per picture, divided along a line, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(2, count, 3, 1, 1, generator=generator)
    angle = torch.rand(count, generator=generator) * 6.28
    axis = torch.linspace(-1, 1, size)
    side = axis[None, None] * angle.cos()[:, None, None] + axis[None, :, None] * angle.sin()[:, None, None] > 0
    images = torch.where(side[:, None], colours[0], colours[1]) * 230
    return (images + torch.rand(images.shape, generator=generator) * 20).to(torch.uint8)


def task(stage: str = "discrete", model: DCHT | None = None, fill_codebook: bool = False, **changes) -> TokenizerTask:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return TokenizerTask(
            settings(stage, **changes),
            dcht() if model is None else model,
            preview_images=pictures(2, seed=9),
            measured=lambda: iter([pictures(2, seed=7), pictures(1, seed=8)]),
            fill_codebook=fill_codebook,
        )


class PlainRun:
    """The loop's side of a step: optimisers at a constant rate, DDP where there are processes."""

    total_steps = 10
    device = torch.device("cpu")

    def __init__(self, task: TokenizerTask, micro_batches: int = 1, seed: int = 5) -> None:
        self.task, self.seed, self.step = task, seed, 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.micro_batches = micro_batches
        self.optimizers = task.optimizers()
        if self.world_size > 1:
            for name, module in task.modules.items():
                task.modules[name] = nn.parallel.DistributedDataParallel(module)

    def rows(self, micro: int) -> slice:
        count = GLOBAL_BATCH // self.world_size // self.micro_batches
        start = (micro * self.world_size + self.rank) * count
        return slice(start, start + count)

    def draws(self, micro: int) -> Draws:
        rows = self.rows(micro)
        return Draws(self.seed, self.step, GLOBAL_BATCH, rows.start, rows.stop - rows.start)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def synchronised(self, module: nn.Module, last: bool):
        return nullcontext() if last or self.world_size == 1 else module.no_sync()

    def update(self, name: str) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.task.modules[name].parameters(), float("inf"))
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        return norm

    def autocast(self):
        return nullcontext()

    def take(self, images: Tensor) -> dict[str, float]:
        """One step on a global batch (G, 3, H, W) uint8; metrics, averaged over the processes."""
        parts = [images[self.rows(micro)] for micro in range(self.micro_batches)]
        batches = [Batch([""] * len(part), [""] * len(part), part) for part in parts]
        metrics = self.task.train_step(self, batches)
        self.step += 1
        for name, value in metrics.items():
            metrics[name] = value.detach().clone()
            if self.world_size > 1:
                dist.all_reduce(metrics[name])
        return {name: value.item() / self.world_size for name, value in metrics.items()}
