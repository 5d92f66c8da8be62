"""The exponential moving average of the weights, and a task with these weights in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dcar_fast.training.task import Task


def decay_at(decay: float, updates: int) -> float:
    """The decay after ``updates`` updates: min(decay, (1 + n) / (10 + n)), so that early weights are soon forgotten."""
    return min(decay, (1 + updates) / (10 + updates))


class Averages:
    """Moving averages of the trained parameters of modules, sharded as they are.

    Frozen parameters and buffers have none: what stands in the module counts, so that BatchNorm's running statistics,
    which are averages already, go along with the averaged weights.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.parameters = {
            name: {key: p for key, p in module.named_parameters() if p.requires_grad}
            for name, module in modules.items()
        }
        self.averages = {
            name: {key: p.detach().clone() for key, p in parameters.items()}
            for name, parameters in self.parameters.items()
        }

    def update(self, updates: int) -> None:
        """average = d average + (1 - d) parameter, d = :func:`decay_at` (decay, updates)."""
        update = get_ema_multi_avg_fn(decay_at(self.decay, updates))
        for averages, parameters in self._local_tensors():
            if averages:
                update(averages, parameters, updates)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters are the averages inside the block, and bit for bit what they were after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def full(self, keep: bool) -> dict[str, dict[str, Tensor]]:
        """The averages, whole and on the CPU, by module and parameter; all processes must call it, those that do not
        ``keep`` them get none."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, averages in self.averages.items():
            found[name] = {}
            for key, average in averages.items():
                whole = average.full_tensor() if isinstance(average, DTensor) else average
                if keep:
                    found[name][key] = whole.to("cpu", copy=True)
        return found

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Takes back what :meth:`full` gave; ``ValueError`` unless names and shapes agree."""
        for name, averages in self.averages.items():
            found = state.get(name, {})
            shapes = {key: tuple(average.shape) for key, average in averages.items()}
            if shapes != {key: tuple(value.shape) for key, value in found.items()}:
                raise ValueError(f"checkpoint: the averages of {name!r} are of other parameters than the model's")
            for key, average in averages.items():
                copy_into(average, found[key])

    @torch.no_grad()
    def _swap(self) -> None:
        for averages, parameters in self._local_tensors():
            for average, parameter in zip(averages, parameters, strict=True):
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)

    @torch.no_grad()
    def _local_tensors(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """This process's parts of averages and parameters, module by module: averaging is elementwise."""
        return [
            ([_local(average) for average in self.averages[name].values()], [_local(p) for p in parameters.values()])
            for name, parameters in self.parameters.items()
        ]


@torch.no_grad()
def copy_into(target: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded: each process takes its part."""
    if isinstance(target, DTensor):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


class Shown:
    """A task with the averaged weights in place, for previews and exports.

    Sharded modules cannot be called by one process alone: then a copy of the task, made before they are sharded and
    kept on the main process's CPU, gets the weights.
    """

    def __init__(self, task: Task, sharded: bool, main: bool) -> None:
        self.task, self.sharded, self.main = task, sharded, main
        self._copy = copy.deepcopy(task) if sharded and main else None

    @contextmanager
    def averaged(
        self, averages: Averages, whole: Callable[[], dict[str, dict[str, Tensor]]], device: torch.device
    ) -> Iterator[Task | None]:
        """On the main process the task to show, else None; all processes must enter. whole: gives the unsharded state
        dicts of the modules. The global random state is the same after the block."""
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if not self.sharded:
                if not self.main:
                    yield None
                    return
                with averages.swapped():
                    yield self.task
                return
            states, averaged = whole(), averages.full(self.main)
            if self._copy is None:
                yield None
                return
            parts = [*self._copy.modules.values(), *self._copy.frozen.values()]
            for name, module in self._copy.modules.items():
                module.load_state_dict(states[name] | averaged.get(name, {}))
            self._copy.load_state_dict(self.task.state_dict())
            for part in parts:
                part.to(device)
            try:
                yield self._copy
            finally:
                for part in parts:
                    part.cpu()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
