"""Weights for the rows of a benchmark: drawn once, saved, and loaded by every row as users load theirs."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from dcar_fast import DCARPipeline

SPARE = 1 << 30  # bytes that must stay free where the weights are kept


@contextlib.contextmanager
def weights(preset: str, folder: str | None = None) -> Iterator[str]:
    """The folder of a pipeline. ``folder`` if there is one; else random weights from seed 0 are drawn, the same
    wherever they are loaded, and saved there, or where they are gone afterwards. ``OSError`` where they do not fit."""
    if folder is not None and Path(folder, "config.json").exists():
        yield folder
        return
    pipeline = DCARPipeline.from_preset(preset, seed=0, device="cpu")
    fill_zeros(pipeline)
    if folder is not None:
        pipeline.save_pretrained(folder)
        del pipeline
        yield folder
        return
    models = (pipeline.tokenizer, pipeline.generator, pipeline.text_encoder)
    size = sum(t.numel() * t.element_size() for model in models for t in model.state_dict().values())
    with tempfile.TemporaryDirectory(prefix="dcar-weights-", dir=_roomy(size + SPARE)) as made:
        pipeline.save_pretrained(made)
        del pipeline, models
        yield made


def _roomy(size: int) -> Path:
    """A folder for temporary files with ``size`` bytes free; OSError if there is none."""
    folders = [Path(tempfile.gettempdir()), Path.cwd(), Path("/dev/shm")]
    for folder in folders:
        if folder.is_dir() and shutil.disk_usage(folder).free >= size:
            return folder
    names = ", ".join(map(str, folders))
    raise OSError(f"the weights need {size >> 20} MiB of disk, which none of {names} has; TMPDIR names another folder")


@torch.no_grad()
def fill_zeros(pipeline: DCARPipeline) -> None:
    """Small random values for parameters that start at zero: as zeros they would hide errors from the parity check, and
    products with zeros draw less power and run faster than those of a trained model."""
    generator = torch.Generator().manual_seed(1)
    for model in (pipeline.tokenizer, pipeline.generator, pipeline.text_encoder):
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02, generator=generator)


def load(folder: str, dtype: str, engine: str, device: torch.device | str) -> DCARPipeline:
    """The pipeline in ``folder`` for a row."""
    return DCARPipeline.from_pretrained(folder, device=device, dtype=getattr(torch, dtype), engine=engine)
