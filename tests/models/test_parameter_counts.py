"""The released models' sizes, to the last parameter, on the meta device."""

from __future__ import annotations

import pytest
import torch

from dcar_fast.config import DCARConfig, DCHTConfig
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.tokenizer import DCHT


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_tokenizer():
    with torch.device("meta"):
        model = DCHT(DCHTConfig())
    assert count(model.encoder) == 123_172_384
    assert count(model.decoder) == 200_184_076
    assert count(model.quantizer) == 524_288
    assert count(model) == 323_880_748


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_generator(tokens):
    with torch.device("meta"):
        model = DCAR(DCARConfig(num_tokens=tokens))
    assert count(model.head) == 36_192_320
    assert model.position.shape == (tokens, 1152)
    assert count(model) == 671_558_592 - 256 * 1152  # the released count includes the position table of 256 tokens
    assert model.null_text.numel() == 230_400
