"""One training step of the full-size tokenizer with all its losses, for training_memory.py."""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dcar_fast.config import DCHTConfig
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.perceptual import BACKBONES
from dcar_fast.training.settings import TokenizerTraining
from dcar_fast.training.task import Draws
from dcar_fast.training.tokenizer import TokenizerTask


def tokenizer_step(size: int, batch: int = 1, config: DCHTConfig | None = None) -> dict[str, float]:
    """AdamW and EMA in float32 on random pictures, stage discrete with LPIPS (VGG-16, random weights), discriminator
    and codebook; "seconds" of a step after the first, which makes the optimisers' state, "loss" and "parameters" (of
    the tokenizer). size: pixels."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "vgg.pth"
        torch.save(random_vgg(), weights)
        settings = TokenizerTraining.from_dict(
            {
                "run": {"output": "unused", "steps": 2, "batch_size": batch},
                "stage": "discrete",
                "lpips_weight": 1.0,
                "lpips_weights": str(weights),
                "gan_weight": 0.5,
            }
        )
        nothing = torch.empty(0, 3, size, size, dtype=torch.uint8)
        task = TokenizerTask(settings, DCHT(config), preview_images=nothing, measured=lambda: ())
    run = _Run(task, batch)
    parameters = [p for name in task.averaged for p in task.modules[name].parameters()]
    averages = [p.detach().clone() for p in parameters]
    update_averages = get_ema_multi_avg_fn(0.999)
    seconds, metrics = 0.0, {}
    for step in range(2):
        images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
        start = time.perf_counter()
        run.step = step
        metrics = task.train_step(run, [Batch([""] * batch, [""] * batch, images)])
        with torch.no_grad():
            update_averages(averages, parameters, step)
        seconds = time.perf_counter() - start
    count = sum(p.numel() for p in task.dcht.parameters())
    return {"seconds": seconds, "loss": metrics["loss"].item(), "parameters": count}


def random_vgg() -> dict[str, Tensor]:
    """The convolutions of VGG-16 by torchvision's names."""
    state, channels, number = {}, 3, 0
    for layer in BACKBONES["vgg"][0]:
        if isinstance(layer, tuple):
            convolution = nn.Conv2d(channels, *layer)
            state |= {f"features.{number}.{name}": p.detach() for name, p in convolution.named_parameters()}
            channels, number = layer[0], number + 2
        elif layer == "pool":
            number += 1
    return state


class _Run:
    """The loop's side of a step, on one CPU."""

    world_size, total_steps, device = 1, 2, torch.device("cpu")

    def __init__(self, task: TokenizerTask, batch: int) -> None:
        self.task, self.batch, self.step = task, batch, 0
        self.optimizers = task.optimizers()

    def draws(self, micro: int) -> Draws:
        return Draws(0, self.step, self.batch, 0, self.batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def synchronised(self, module: nn.Module, last: bool):
        return nullcontext()

    def autocast(self):
        return nullcontext()

    def update(self, name: str) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.task.modules[name].parameters(), 1.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        return norm
