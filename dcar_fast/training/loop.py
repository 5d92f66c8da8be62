"""The training loop: accelerate, moving averages, checkpoints, logs, previews, and what stops a run.

An output folder holds checkpoints/, metrics.jsonl, previews/, log/ (TensorBoard) and, at the end, model/.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dcar_fast.training import checkpoint as files
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.ema import Averages, Shown
from dcar_fast.training.launch import accelerated, prepare_process
from dcar_fast.training.lock import only_writer
from dcar_fast.training.settings import OptimizerSettings, RunSettings
from dcar_fast.training.step import StepRun, learning_rate
from dcar_fast.training.task import Task
from dcar_fast.training.tracking import Clock, Log, Means, check_trackers
from dcar_fast.training.watch import NonFiniteLoss, TrainingInterrupted, Watch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["NonFiniteLoss", "Report", "TrainingInterrupted", "train"]


@dataclass(frozen=True)
class Report:
    """How a run ended. metrics: the last line of the log (main process); model: what the task exported; seconds: of
    training, earlier parts of the run included."""

    step: int
    metrics: dict[str, float]
    model: Path
    checkpoint: Path
    seconds: float


def train(
    task: Task,
    run: RunSettings,
    optimizers: dict[str, OptimizerSettings],
    make_loader: Callable[..., Iterator[Batch]],
    identity: dict[str, Any] | None = None,
) -> Report:
    """Runs ``task`` until ``run.steps`` steps are done, from the newest checkpoint in ``run.output`` if there is one.

    Every process of the launcher calls it with the same arguments; ``run.output`` is a folder that all machines share.

    optimizers: settings by module name, those of ``task.optimizers()``. make_loader: gives the endless batches of this
    process, called with the keywords batch_size, world_size, rank, accumulation, start_step and position (None at the
    start; after that the ``Batch.position`` of the last batch used); if the result has ``close`` it is called at the
    end, and what it counts in ``skipped`` is logged. identity: ``settings.to_dict()`` of the whole training; a
    checkpoint of other settings is refused (:data:`dcar_fast.training.checkpoint.FREE` says which may change).

    ``ValueError``: settings that do not fit together or to the checkpoint, or another run that writes ``run.output``
    at this moment. :class:`NonFiniteLoss`: see
    :class:`dcar_fast.training.watch.Watch`. :class:`TrainingInterrupted`, a KeyboardInterrupt: after SIGINT or SIGTERM,
    when the step is finished and saved.
    """
    if set(task.modules) != set(optimizers):
        raise ValueError(f"optimizers must be given for {sorted(task.modules)}, got {sorted(optimizers)}")
    prepare_process(run)
    check_trackers(run.trackers)
    with accelerated(run, task.modules, task.can_shard) as accelerator, _only_run(accelerator, Path(run.output)):
        share = accelerator.num_processes * run.accumulation
        if run.batch_size % share:
            processes = f"{accelerator.num_processes} processes x {run.accumulation} accumulated parts"
            raise ValueError(f"run.batch_size must be a multiple of {processes}, got {run.batch_size}")
        plain = dict(task.modules)
        try:
            return _Training(accelerator, task, run, optimizers, identity or {"run": asdict(run)}).all_steps(
                make_loader
            )
        finally:
            task.modules.update(plain)
            for module in plain.values():
                for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # accelerate's marks
                    vars(module).pop(name, None)


@contextmanager
def _only_run(accelerator: Accelerator, output: Path) -> Iterator[None]:
    """The main process holds the output folder's lock; all raise what it meets."""
    with ExitStack() as stack:
        refused = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(only_writer(output))
            except ValueError as error:
                refused = f"run.output: {error}"
        refused = gathered(refused)[0]
        if refused is not None:
            raise ValueError(refused)
        yield


class _Training:
    """A run between its start or resumption and its end."""

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        run: RunSettings,
        settings: dict[str, OptimizerSettings],
        identity: dict[str, Any],
    ) -> None:
        self.accelerator, self.task, self.run, self.settings, self.identity = accelerator, task, run, settings, identity
        self.output = Path(run.output)
        self.root = self.output / "checkpoints"
        self.main, self.device = accelerator.is_main_process, accelerator.device
        sharded = accelerator.is_fsdp2
        self.shown = Shown(task, sharded, self.main)
        for module in task.frozen.values():
            module.to(self.device)
        self.optimizers = task.optimizers()
        if set(self.optimizers) != set(task.modules):
            raise ValueError(f"the task has optimisers for {sorted(self.optimizers)}, modules {sorted(task.modules)}")
        plain = dict(task.modules)
        for name, module in plain.items():
            if sharded:
                task.modules[name], _ = accelerator.prepare(module, self.optimizers[name])
            else:
                with warnings.catch_warnings():  # of torch 2.13, about the name of an argument that accelerate passes
                    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                    task.modules[name] = accelerator.prepare(module)
        self.averages = Averages({name: plain[name] for name in task.averaged}, run.ema_decay)
        self.means = Means()
        self.step = 0
        self.saved: Path | None = None
        self.position: dict[str, Any] | None = None
        self.clock = Clock()
        self._resume()

    def all_steps(self, make_loader: Callable[..., Iterator[Batch]]) -> Report:
        run, world = self.run, self.accelerator.num_processes
        log = Log(self.accelerator, self.output, self.identity, self.step, run.steps)
        watch = Watch(self.device, world)
        step_run = StepRun(self.accelerator, watch, run, self.optimizers, self.settings)
        loader = None
        try:
            if self.saved is not None:
                log.say(f"continues at step {self.step} from {self.saved}")
            if self.step < run.steps:
                loader = make_loader(
                    batch_size=run.batch_size,
                    world_size=world,
                    rank=self.accelerator.process_index,
                    accumulation=run.accumulation,
                    start_step=self.step,
                    position=self.position,
                )
                with watch:
                    self._steps(step_run, iter(loader), loader, watch, log)
            with self.clock.paused():
                self._export(log)
        finally:
            if hasattr(loader, "close"):
                loader.close()
            log.close()
        return Report(self.step, log.last, self.output / "model", self.saved, self.clock.seconds)

    def _steps(self, step_run: StepRun, batches: Iterator[Batch], loader: Any, watch: Watch, log: Log) -> None:
        """The steps that are left, and what is due after each."""
        run = self.run
        line, waited = (self.step, self.clock.seconds), 0.0  # of the log, the last one; seconds without data since
        while self.step < run.steps:
            before = time.monotonic()
            parts = [next(batches) for _ in range(run.accumulation)]
            waited += time.monotonic() - before
            ends = self.step + 1 == run.steps
            logs, previews, saves = (
                every > 0 and (ends or (self.step + 1) % every == 0)
                for every in (run.log_every, run.preview_every, run.checkpoint_every or run.steps)
            )
            step_run.begin(self.step, parts)
            try:
                metrics = self.task.train_step(step_run, parts)
                stops = watch.stop
                if logs or previews or saves or stops:
                    watch.settle()
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error}; the last good checkpoint is {self.saved or 'none'}") from None
            self.averages.update(self.step)
            self.means.add(metrics)
            self.position = parts[-1].position
            self.step += 1
            log.advance()
            if logs:
                values = self.means.over_processes(self.accelerator) | self._learning_rates() | self._skipped(loader)
                self.means.clear()
                done, seconds = self.step - line[0], max(self.clock.seconds - line[1], 1e-9)
                values["waiting_for_data"] = min(1.0, waited / seconds)
                line, waited = (self.step, self.clock.seconds), 0.0
                log.metrics(
                    self.step,
                    values,
                    done * run.batch_size / seconds,
                    self.clock,
                    seconds / done * (run.steps - self.step),
                )
            with self.clock.paused():
                if previews:
                    with self._shown() as task:
                        if task is not None:
                            log.pictures(self.step, task.preview(step_run))
                    self.accelerator.wait_for_everyone()
                if saves or stops:
                    self._save()
            if stops and not ends:
                message = f"stopped after step {self.step}, which is saved as {self.saved}"
                log.say(message)
                raise TrainingInterrupted(message)

    def _shown(self) -> AbstractContextManager[Task | None]:
        """The task to preview or export, with averaged weights; None but on the main process."""

        def whole() -> dict[str, dict[str, Tensor]]:
            return {name: files.module_state(module) for name, module in self.task.modules.items()}

        return self.shown.averaged(self.averages, whole, self.device)

    def _export(self, log: Log) -> Path:
        folder = self.output / "model"
        with self._shown() as task:
            if task is not None:
                task.export(folder)
        self.accelerator.wait_for_everyone()
        log.say(f"step {self.step}: the model is in {folder}")
        return folder

    def _learning_rates(self) -> dict[str, float]:
        """Those of the last step; the first module's has the plain name."""
        rates = {name: learning_rate(s, self.step - 1, self.run.steps) for name, s in self.settings.items()}
        return {"learning_rate" if i == 0 else f"{name}_learning_rate": r for i, (name, r) in enumerate(rates.items())}

    def _skipped(self, loader: Any) -> dict[str, float]:
        """How many examples or files were left out since the run or its continuation began, if any."""
        count = torch.tensor(float(sum(getattr(loader, "skipped", {}).values())), device=self.device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.reduce(count, "sum")
        return {"skipped": count.item()} if count else {}

    def _save(self) -> None:
        """A checkpoint of the steps done; all processes call it."""
        modules = self.task.modules
        states = {
            "modules": {name: files.module_state(module) for name, module in modules.items()},
            "averages": self.averages.full(self.main),
            "optimizers": {name: files.optimizer_state(m, self.optimizers[name]) for name, m in modules.items()},
            "rest": {"task": self.task.state_dict(), "random": gathered(random_state(self.device))},
        }
        record = {
            "settings": self.identity,
            "positions": gathered(self.position),
            "means": self.means.state_dict(self.accelerator),
            "seconds": self.clock.seconds,
            "batch_size": self.run.batch_size,
            "processes": self.accelerator.num_processes,
        }
        if self.main:
            files.write_checkpoint(self.root, self.step, states, record, self.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        self.saved = files.checkpoints(self.root)[-1]

    def _resume(self) -> None:
        """Takes everything back from the newest checkpoint, if there is one."""
        if self.main:
            files.remove_leftovers(self.root)
        self.accelerator.wait_for_everyone()
        found = files.checkpoints(self.root)
        newest = found[-1].name if found else None
        if set(gathered(newest)) != {newest}:
            raise ValueError(f"run.output must be a folder that all machines share, {self.output} is not")
        if newest is None:
            return
        folder = found[-1]
        if not self.run.resume:
            raise ValueError(f"run.output must hold no checkpoints where run.resume is false, got {folder}")
        record = files.read_record(folder)
        files.check_same_run(record["settings"], self.identity, folder)
        if record["step"] > self.run.steps:
            raise ValueError(f"run.steps must be at least {record['step']}, the step of {folder}, got {self.run.steps}")
        states = {name: files.read_state(folder, name) for name in ("modules", "averages", "optimizers", "rest")}
        if states["modules"].keys() != self.task.modules.keys():
            raise ValueError(
                f"checkpoint {folder} is of the modules {sorted(states['modules'])}, now there are "
                f"{sorted(self.task.modules)}"
            )
        for name, module in self.task.modules.items():
            files.check_same_tensors(module, states["modules"][name], name, folder)
            files.load_optimizer_state(module, self.optimizers[name], states["optimizers"][name])
            files.load_module_state(module, states["modules"][name])
        self.averages.load(states["averages"])
        self.task.load_state_dict(states["rest"]["task"])
        rank = self.accelerator.process_index
        if rank < len(states["rest"]["random"]):
            set_random_state(states["rest"]["random"][rank])
        positions = record["positions"]
        self.position = positions[rank] if rank < len(positions) else positions[0]
        self.means.load_state_dict(record["means"], self.device)
        self.step, self.saved, self.clock = record["step"], folder, Clock(record["seconds"])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's global generators, which no loss depends on but a task may use."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def gathered(value: Any) -> list[Any]:
    """Every process's value, on all of them."""
    from accelerate.utils import gather_object

    return gather_object([value])
