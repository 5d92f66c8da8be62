"""Trainings that are parts of a study: run by the package's trainer, continued after an interruption, done once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _report import note

from _reproduction.context import Context
from _reproduction.store import read, write
from dcar_fast.training.data.loader import make_loader
from dcar_fast.training.generator_setup import train_generator
from dcar_fast.training.loop import Report, train
from dcar_fast.training.settings import GeneratorTraining, RunSettings, TokenizerTraining
from dcar_fast.training.task import Draws
from dcar_fast.training.tokenizer import TOKENIZER, TokenizerTask
from dcar_fast.training.tokenizer_setup import make_tokenizer_task, pictures, train_tokenizer

CHECKPOINTS = 20  # of a training, one after another: what an interruption costs at most, as a share
MIXED = "each picture takes either path, all parts learn"

Settings = TokenizerTraining | GeneratorTraining


def run_settings(context: Context, name: str, seed: int, steps: int, batch: int, ema: float) -> RunSettings:
    """Of a training in the store's folder ``name``."""
    return RunSettings(
        output=str(context.store.training(name)),
        steps=steps,
        batch_size=batch,
        precision="bfloat16",
        seed=seed,
        ema_decay=ema,
        checkpoint_every=max(1, steps // CHECKPOINTS),
        keep_checkpoints=1,
        log_every=max(1, min(50, steps // 4)),
        preview_every=0,
        trackers=(),
        device="cpu" if context.device.type == "cpu" else "auto",
    )


def finish(settings: Settings, mixed_paths: bool = False) -> dict[str, Any]:
    """Trains, from the newest checkpoint if the training was interrupted; if it is done, does nothing.

    Returns "model" (the folder), "steps" and "seconds" of training. ``ValueError`` for a finished training of other
    settings in the same folder. What only a continuation needs is removed when the training is done.
    """
    folder = Path(settings.run.output)
    kind = MIXED if mixed_paths else type(settings).__name__
    identity = {"kind": kind, **_portable(settings.to_dict())}
    done = folder / "done.json"
    if not done.is_file():
        note(f"training {folder.name}: {settings.run.steps} steps")
        report = _trainer(settings, mixed_paths)(settings)
        model = str(report.model.relative_to(folder))
        write(done, {"settings": identity, "model": model, "steps": report.step, "seconds": report.seconds})
    found = read(done)
    if found["settings"] != identity:
        raise ValueError(f"{folder} holds a training of other settings; choose another folder for the results")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {"model": str(folder / found["model"]), "steps": found["steps"], "seconds": found["seconds"]}


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what no result depends on: names of folders, which move, and the device, which the store knows."""
    values = json.loads(json.dumps(settings))
    for name in ("output", "device", "threads"):
        del values["run"][name]
    values["data"].pop("path")
    for name in ("initial", "tokenizer"):
        if name in values:
            values[name] = bool(values[name])
    return values


def _trainer(settings: Settings, mixed_paths: bool) -> Callable[[Any], Report]:
    if mixed_paths:
        return train_mixed
    return train_tokenizer if isinstance(settings, TokenizerTraining) else train_generator


class MixedPathsTask(TokenizerTask):
    """The discrete stage, in which each picture takes the continuous or the discrete path with probability 1/2.

    Encoder, codes and decoder all learn: the paper's "alternate training" without a stage of its own for the decoder.
    """

    def _paths(self, draws: Draws, filling: bool) -> torch.Tensor:
        if filling:  # while the codes are still being filled with encoder outputs
            return super()._paths(draws, filling)
        return draws.rows(torch.rand(draws.total, generator=draws.generator("path")) < 0.5)


def train_mixed(settings: TokenizerTraining) -> Report:
    """:func:`dcar_fast.training.tokenizer_setup.train_tokenizer` with :class:`MixedPathsTask`, for the stage
    "discrete"."""
    if settings.stage != "discrete":
        raise ValueError(f"stage must be 'discrete', whose parts all learn, got {settings.stage!r}")
    made = make_tokenizer_task(settings)  # what is loaded and checked for the discrete stage
    size = settings.data.size
    task = MixedPathsTask(
        settings,
        made.dcht,
        preview_images=torch.empty(0, 3, size, size, dtype=torch.uint8),
        measured=partial(pictures, settings.data, settings.residual_std_examples),
        fill_codebook=made.fill_codebook,
    )
    loaders = partial(make_loader, settings.data, captions=False)
    identity = {**settings.to_dict(), "paths": MIXED}
    return train(task, settings.run, {TOKENIZER: settings.optimizer}, loaders, identity)
