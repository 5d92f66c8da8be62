"""The loop's side of a step: random numbers, gradients, and the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dcar_fast.training.data.examples import Batch
from dcar_fast.training.settings import OptimizerSettings, RunSettings
from dcar_fast.training.task import Draws
from dcar_fast.training.watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """The rate of the step after ``step`` others: a linear rise over the warm-up, whose last step has the full rate,
    then constant or half a cosine, which the last of ``total_steps`` steps ends with the final rate."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.final_learning_rate is None:
        return settings.learning_rate
    length = max(1, total_steps - 1 - settings.warmup_steps)
    share = min(1.0, (step - settings.warmup_steps) / length)
    fall = settings.learning_rate - settings.final_learning_rate
    return settings.final_learning_rate + fall * (1 + math.cos(math.pi * share)) / 2


class StepRun:
    """A :class:`dcar_fast.training.task.Run` on accelerate."""

    def __init__(
        self,
        accelerator: Accelerator,
        watch: Watch,
        run: RunSettings,
        optimizers: dict[str, torch.optim.Optimizer],
        settings: dict[str, OptimizerSettings],
    ) -> None:
        self.step, self.total_steps = 0, run.steps
        self.world_size, self.device = accelerator.num_processes, accelerator.device
        self._accelerator, self._watch, self._run = accelerator, watch, run
        self._optimizers, self._settings = optimizers, settings
        self._losses: list[Tensor] = []
        self._keys: list[str] = []

    def begin(self, step: int, batches: Sequence[Batch]) -> None:
        """step: steps done before this one."""
        self.step, self._keys = step, [key for batch in batches for key in batch.keys]
        self._losses = []

    def draws(self, micro: int) -> Draws:
        total = self._run.batch_size
        count = total // (self.world_size * self._run.accumulation)
        start = (micro * self.world_size + self._accelerator.process_index) * count
        return Draws(self._run.seed, self.step, total, start, count)

    def backward(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        self._accelerator.backward(loss)

    def synchronised(self, module: nn.Module, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self._accelerator.no_sync(module)

    def autocast(self) -> AbstractContextManager:
        return self._accelerator.autocast()

    def update(self, name: str) -> Tensor:
        optimizer, settings = self._optimizers[name], self._settings[name]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm.to(self.device)
        numbers = torch.stack([norm.float(), *(loss.float() for loss in self._losses)])
        self._losses = []
        self._watch.look(~numbers.isfinite().all(), self.step, self._keys)
        if settings.clip:
            nn.utils.clip_grads_with_norm_(parameters, settings.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step, self.total_steps)
        optimizer.step()
        optimizer.zero_grad()
        return norm
