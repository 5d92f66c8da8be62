"""The folded decoder gives the decoder's images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcar_fast.config import preset
from dcar_fast.engine.decoder import FastDecoder
from dcar_fast.models.tokenizer import DCHT
from tests.golden_vectors import error


@pytest.fixture(scope="module")
def tokenizer() -> DCHT:
    torch.manual_seed(0)
    model = DCHT(preset("shapes").tokenizer).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
    return model


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 1, 5), (2, 4, 3)])
def test_equals_the_decoder(tokenizer: DCHT, shape: tuple[int, int, int]) -> None:
    latents = torch.randn(shape[0], tokenizer.config.latent_channels, *shape[1:])
    expected = tokenizer.decoder(latents)
    got = FastDecoder(tokenizer.decoder, torch.float32)(latents)
    assert got.shape == expected.shape and error(got, expected) < 1e-5
    low = FastDecoder(tokenizer.decoder, torch.bfloat16)(latents)
    assert low.dtype == torch.bfloat16 and error(low.float(), expected) < 0.1


def test_no_batch_norm_is_left_and_the_decoder_is_untouched(tokenizer: DCHT) -> None:
    before = {name: value.clone() for name, value in tokenizer.decoder.state_dict().items()}
    fast = FastDecoder(tokenizer.decoder, torch.float32)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.decoder.modules())
    after = tokenizer.decoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
