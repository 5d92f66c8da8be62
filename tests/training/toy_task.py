"""A task of a few hundred weights whose losses depend on data, random numbers and the whole global batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dcar_fast.training.data.examples import Batch, Example
from dcar_fast.training.data.loader import Split, random_access_loader
from dcar_fast.training.loop import Report, train
from dcar_fast.training.settings import OptimizerSettings, RunSettings
from dcar_fast.training.task import Run, Task

SIZE = 4  # pixels
OPTIMIZER = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, warmup_steps=3, final_learning_rate=1e-3, clip=0.5)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).tanh()


class Net(nn.Module):
    """Pixels to pixels; "passes" is a buffer that every step changes, "late" a weight that may come in later."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(3 * SIZE * SIZE, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.last = nn.Linear(width, 3 * SIZE * SIZE)
        self.late = nn.Parameter(torch.zeros(width))
        self.fixed = nn.Parameter(torch.ones(width), requires_grad=False)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor, noise: Tensor, late: bool) -> Tensor:
        if self.training:
            self.passes += 1
        x = self.first(x) * self.fixed
        for block in self.blocks:
            x = block(x)
        return self.last(x + self.late if late else x) + 0.1 * noise


class ToyTask(Task):
    """Reconstructs noisy pixels; a second module joins in after two steps, as a discriminator would.

    bad_step: the step (from 0) in which the first process's loss is ``bad_value``.
    """

    can_shard = True

    def __init__(
        self,
        width: int = 8,
        critic: bool = True,
        late: bool = False,
        bad_step: int = -1,
        bad_value: float = float("nan"),
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = Net(width)
            self.modules = {"net": self.net}
            if critic:
                self.modules["critic"] = nn.Linear(3 * SIZE * SIZE, 1)
        if not late:
            self.net.late.requires_grad_(False)
        self.late, self.bad_step, self.bad_value = late, bad_step, bad_value
        self.averaged = ("net",)
        self.frozen = {}
        self.seen = torch.zeros((), dtype=torch.int64)
        self.exported: list[Path] = []

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        found = {}
        for name, module in self.modules.items():
            parameters = [p for p in module.parameters() if p.requires_grad]
            groups = [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ]
            found[name] = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
        return found

    def train_step(self, run: Run, batches: Sequence[Batch]) -> dict[str, Tensor]:
        torch.rand(1)  # moves the global generator, whose state must come back
        total: Tensor | float = 0.0
        critic_loss: Tensor | float = 0.0
        for micro, batch in enumerate(batches):
            draws, last = run.draws(micro), micro == len(batches) - 1
            pixels = batch.images.to(run.device).flatten(1).float() / 127.5 - 1
            assert len(pixels) == draws.count
            noise = draws.rows(torch.randn(draws.total, pixels.shape[1], generator=draws.generator("noise")))
            weight = torch.rand(draws.total, generator=draws.generator("weight"))
            rows = draws.rows(weight / weight.sum()).to(run.device)  # normalised by the global batch
            net = self.modules["net"]
            with run.synchronised(net, last):
                with run.autocast():
                    made = net(pixels, noise.to(run.device), self.late and run.step >= 2)
                loss = ((made.float() - pixels).square().mean(dim=1) * rows).sum()
                if run.step == self.bad_step and draws.start == 0:
                    loss = loss * self.bad_value
                run.backward(loss * run.world_size)
            total = total + loss.detach() * run.world_size
            if "critic" in self.modules and run.step >= 2:
                critic = self.modules["critic"]
                with run.synchronised(critic, last):
                    judged = critic(made.detach().float()).squeeze(1).square()
                    run.backward((judged * rows).sum() * run.world_size)
                critic_loss = critic_loss + (judged.detach() * rows).sum() * run.world_size
        metrics = {"loss": total, "gradient_norm": run.update("net")}
        if "critic" in self.modules and run.step >= 2:
            metrics |= {"critic": critic_loss, "critic_norm": run.update("critic")}
        self.seen += 1
        return metrics

    def preview(self, run: Run) -> dict[str, Image.Image]:
        torch.rand(7)  # a careless use of the global generator
        values = self.net.last.bias.detach().cpu().numpy()
        pixels = np.uint8(np.clip(values * 400 + 128, 0, 255)).reshape(SIZE, SIZE, 3)
        return {"bias": Image.fromarray(pixels)}

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.net.state_dict().items()}, folder / "net.safetensors"
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"].clone()


class Colours:
    """Example i: a picture of random pixels, a pure function of i."""

    def example(self, index: int) -> Example:
        pixels = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        return Example(f"colours-{index}", pixels, "")


def loader(batch_size, world_size, rank, accumulation, start_step, position):
    split = Split(batch_size, world_size, rank, accumulation)
    return random_access_loader(Colours(), split, start_step=start_step, position=position)


def settings(output: Path | str, **changes: Any) -> RunSettings:
    values = {
        "output": str(output),
        "steps": 8,
        "batch_size": 4,
        "seed": 5,
        "ema_decay": 0.9,
        "checkpoint_every": 3,
        "log_every": 1,
        "preview_every": 0,
        "trackers": (),
        "device": "cpu",
    }
    return RunSettings(**{**values, **changes})


def run(output: Path | str, task: Task | None = None, loader=loader, identity=None, **changes: Any) -> Report:
    """Trains a toy task in ``output``."""
    task = ToyTask() if task is None else task
    made = settings(output, **changes)
    return train(task, made, dict.fromkeys(task.modules, OPTIMIZER), partial(loader), identity)
