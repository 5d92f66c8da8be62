"""FLOPs of the sampler at full size and 512 px, counted by torch on tensors without data, in steady state."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dcar_fast.config import preset
from dcar_fast.models.dcar import DCAR
from dcar_fast.noise import Noise
from dcar_fast.sampling.fast import FastSampler

REST = 2.77 + 0.05  # TFLOP of decoder and text encoder, which the sampler does not touch


class Empty(Noise):
    """Draws of the right shapes: what they hold does not matter here."""

    def token(self, step: int) -> torch.Tensor:
        return torch.empty(1, 256, 16384)

    def confidence(self, step: int) -> torch.Tensor:
        return torch.empty(1, 256)

    def latent_init(self) -> torch.Tensor:
        return torch.empty(1, 256, 32)

    def latent(self, i: int) -> torch.Tensor:
        return torch.empty(1, 256, 32)


@pytest.mark.parametrize(("length", "budget"), [(64, 10.4), (16, 9.8)])
def test_budget(length: int, budget: float) -> None:
    with torch.device("meta"):
        sampler = FastSampler(DCAR(preset("dc-ar-512").generator).to("meta"))
        states, mask = torch.empty(1, length, 768), torch.ones(1, length, dtype=torch.bool)
        sampler(states, mask, Empty(), lengths=[length])  # fills what is kept between calls
        with FlopCounterMode(display=False) as counter:
            sampler(states, mask, Empty(), lengths=[length])
    teraflop = counter.get_total_flops() / 1e12
    assert 0.9 * (budget - REST) < teraflop <= budget - REST, f"{teraflop:.2f} TFLOP"
