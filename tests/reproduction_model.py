"""A pipeline of a few thousand random weights that says it is trained, and a budget to match, for reproduction.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dcar_fast import DCARPipeline
from dcar_fast.models.tokenizer import DCHT
from tests.training.tiny_generator import TOKENIZER, models

DEEPER = replace(
    TOKENIZER,
    widths=(32, 32, 32, 32),
    encoder_depths=(0, 1, 1, 1),
    decoder_depths=(0, 1, 1, 1),
    blocks=("res", "res", "res", "efficientvit"),
    decoder_norms=("batch_norm", "batch_norm", "batch_norm", "layer_norm"),
    decoder_acts=("relu", "relu", "relu", "silu"),
)
BUDGET = {
    "prompts": 6,
    "sampling_batch": 3,
    "timed_rounds": 1,
    "stages_steps": 8,
    "stages_batch": 2,
    "pretraining_steps": 3,
    "finetuning_steps": 1,
    "generator_batch": 2,
    "cached_pictures": 8,
    "workers": 0,
    "full_size_preset": "shapes",
}


def pipeline(trained: bool = True) -> DCARPipeline:
    """8x compression, 32 px (the least that ShapesEval takes), 4 x 4 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = DCHT(DEEPER)
    return DCARPipeline(tokenizer, *models()[1:], trained=trained)


def save_model(folder: Path, trained: bool = True) -> Path:
    """:func:`pipeline`, saved."""
    pipeline(trained).save_pretrained(folder)
    return folder
