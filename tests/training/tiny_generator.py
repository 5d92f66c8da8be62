"""A generator, a tokenizer and a text encoder of a few thousand weights, and a run without accelerate to train them."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from dcar_fast.config import DCARConfig, DCHTConfig, TextEncoderConfig
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.models.tokenizer import DCHT
from dcar_fast.training.data.examples import Batch
from dcar_fast.training.generator import GeneratorTask
from dcar_fast.training.settings import GeneratorTraining
from dcar_fast.training.task import Draws

SIZE = 16  # pixels: 4 x 4 tokens
TOKENIZER = DCHTConfig(
    codebook_size=64,
    latent_channels=8,
    widths=(32, 32, 32),
    encoder_depths=(0, 1, 1),
    decoder_depths=(0, 1, 1),
    blocks=("res", "res", "efficientvit"),
    decoder_norms=("batch_norm", "batch_norm", "layer_norm"),
    decoder_acts=("relu", "relu", "silu"),
)
GENERATOR = DCARConfig(
    codebook_size=64,
    latent_channels=8,
    num_tokens=16,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    mlp_hidden_size=64,
    text_length=24,
    text_dim=16,
    head_width=32,
    head_depth=1,
    head_steps=8,
    head_batch_multiplier=2,
)
TEXT = TextEncoderConfig(
    tokenizer="bytes",
    max_length=24,
    attend_pads=False,
    vocab_size=384,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_layers=1,
    num_heads=2,
    feed_forward_proj="gated-gelu",
)
CAPTIONS = ("a red circle", "two squares", "a blue triangle on grey", "nothing", "x", "a green square", "yes", "no no")


def settings(**changes) -> GeneratorTraining:
    values = {
        "run": {"output": "unused", "steps": 1000, "batch_size": 8},
        "data": {"size": SIZE},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.03},
        "tokenizer": "unused",
        "model": {"generator": GENERATOR.to_dict(), "text": TEXT.to_dict()},
        "residual_scale": 0.2,
        "preview_prompts": ["a red circle", "two squares"],
    }
    return GeneratorTraining.from_dict({**values, **changes})


def models(seed: int = 0, **changes) -> tuple[DCHT, DCAR, TextEncoder]:
    """New models; ``changes`` go to the generator's config. Weights that start at 0 are random, so that all matter."""
    import dataclasses

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = DCHT(TOKENIZER), DCAR(dataclasses.replace(GENERATOR, **changes)), TextEncoder(TEXT)
        for parameter in made[1].head.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return made


def task(joint: bool = True, calibration=None, seed: int = 0, **changes) -> GeneratorTask:
    return GeneratorTask(settings(**changes), *models(seed), joint=joint, calibration=calibration)


def batch(rows=range(8)) -> Batch:
    """Rows of a fixed set of eight pictures with captions."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8, generator=generator)
    images = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    rows = list(rows)
    return Batch([f"picture-{i}" for i in rows], [CAPTIONS[i] for i in rows], images[rows])


class PlainRun:
    """A :class:`dcar_fast.training.task.Run` in float32: AdamW at a constant rate, gradients clipped to norm 1."""

    def __init__(self, made: GeneratorTask, *, rows: int = 8, accumulation: int = 1, world=1, rank=0, seed=0) -> None:
        self.task, self.optimizers = made, made.optimizers()
        self.step, self.total_steps, self.seed = 0, 1000, seed
        self.world_size, self.rank, self.accumulation, self.rows = world, rank, accumulation, rows
        self.device = torch.device("cpu")
        if world > 1:
            made.modules = {name: nn.parallel.DistributedDataParallel(m) for name, m in made.modules.items()}

    def draws(self, micro: int) -> Draws:
        count = self.rows // self.world_size // self.accumulation
        return Draws(self.seed, self.step, self.rows, (micro * self.world_size + self.rank) * count, count)

    def backward(self, loss) -> None:
        loss.backward()

    def synchronised(self, module, last: bool):
        return module.no_sync() if self.world_size > 1 and not last else nullcontext()

    def autocast(self):
        return nullcontext()

    def update(self, name: str):
        norm = nn.utils.clip_grad_norm_(self.task.modules[name].parameters(), 1.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
        return norm

    def train(self, steps: int) -> list[dict[str, float]]:
        """Steps on the fixed batch of eight; the values of each, mean over the processes left to the caller."""
        history = []
        for _ in range(steps):
            parts = [self.draws(micro) for micro in range(self.accumulation)]
            values = self.task.train_step(self, [batch(range(p.start, p.start + p.count)) for p in parts])
            history.append({name: float(value) for name, value in values.items()})
            self.step += 1
        return history
