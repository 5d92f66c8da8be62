"""What a training loop runs: the contract between :mod:`dcar_fast.training.loop` and the two trainers.

Every random number of a step is a function of (seed, step, name) for the whole global batch, of which each process and
each micro-batch takes its rows: the same losses come out however the batch is split, and a resumed run needs no state.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from dcar_fast.training.data.examples import Batch


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch: rows ``start .. start + count`` of the global batch's ``total``."""

    seed: int
    step: int
    total: int
    start: int
    count: int

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator that depends on seed, step and name alone: draw for all ``total`` rows, take ``rows``."""
        digest = hashlib.sha256(f"{self.seed}/{self.step}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def rows(self, values: Tensor) -> Tensor:
        """This micro-batch's rows of ``values`` (total, ...)."""
        return values[self.start : self.start + self.count]


class Run(Protocol):
    """What the loop offers a task during a step."""

    step: int
    """Optimiser steps done before this one."""
    total_steps: int
    world_size: int
    device: torch.device

    def draws(self, micro: int) -> Draws: ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a scalar. Processes are averaged: a loss normalised by the global batch is multiplied
        by ``world_size`` first."""

    def synchronised(self, module: nn.Module, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch; only the ``last`` of a step exchanges gradients."""

    def update(self, name: str) -> Tensor:
        """Clips, steps the optimiser ``name`` at its scheduled rate and clears its gradients; the norm before it."""

    def autocast(self) -> AbstractContextManager:
        """bfloat16 or nothing, as the run's precision says."""


class Task(ABC):
    """A thing to train. The loop prepares ``modules`` (DDP or FSDP2), which are then called as wrapped."""

    modules: dict[str, nn.Module]
    """Trained modules by name; their forward is what the processes share (loss or reconstruction)."""
    averaged: tuple[str, ...]
    """Names of the modules that have a moving average (EMA)."""
    frozen: dict[str, nn.Module]
    """Modules that are moved to the device and neither trained nor saved."""
    can_shard: bool = False
    """Whether the one module may be sharded (FSDP2). Then previews and exports are made by a ``copy.deepcopy`` of the
    task from before the first step, with the averaged weights and :meth:`state_dict` loaded."""

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One per module, by the same names; made before the modules are wrapped."""

    @abstractmethod
    def train_step(self, run: Run, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Forward, backward and update for the micro-batches of one step. Returns scalars on the device, whose mean
        over the processes is logged; it must contain "loss"."""

    @abstractmethod
    def preview(self, run: Run) -> dict[str, Image.Image]:
        """Pictures for the log (reconstructions, samples), made with the averaged weights swapped in; main process."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes what users load, with the averaged weights swapped in; called on the main process."""

    def state_dict(self) -> dict[str, Tensor]:
        """Further tensors that a resumed run needs (counters of code usage and the like)."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - most tasks have nothing to take back
        """Takes back what :meth:`state_dict` gave."""
