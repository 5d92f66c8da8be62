"""sample_tokens: the logits head, then the sampling; bad input."""

from __future__ import annotations

import pytest
import torch

from dcar_fast import ops
from tests.ops.sampling_cases import SETTINGS, by_hand, draws, normals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guided", [True, False])
def test_sample_tokens_is_the_head_and_then_the_sampling(guided, dtype):
    cond, uncond = normals(6, 20, dtype=dtype), normals(6, 20, seed=1, dtype=dtype) if guided else None
    weight, bias, u = normals(33, 20, seed=2, dtype=dtype), normals(33, seed=3, dtype=dtype), draws(6, 33)
    found = ops.sample_tokens(cond, uncond, weight, bias, noise=u, **SETTINGS)
    logits = [None if h is None else h.double() @ weight.double().T + bias.double() for h in (cond, uncond)]
    ids, confidence = by_hand(*logits, u, **SETTINGS)
    assert found[0].tolist() == ids.tolist()
    assert torch.allclose(found[1].double(), confidence.double(), rtol=1e-5, atol=1e-4)


COND, WEIGHT, BIAS = torch.zeros(2, 6), torch.zeros(9, 6), torch.zeros(9)


def _tokens(cond=COND, uncond=None, weight=WEIGHT, bias=BIAS, noise=None):
    noise = torch.zeros(2, 9) if noise is None else noise
    ops.sample_tokens(cond, uncond, weight, bias, noise=noise, **SETTINGS)


BAD = [
    ("uncond", lambda: _tokens(uncond=COND.int())),
    ("noise", lambda: _tokens(noise=torch.zeros(2, 6))),
    ("noise", lambda: _tokens(noise=7)),
    ("weight", lambda: _tokens(weight=WEIGHT.T)),
    ("weight", lambda: _tokens(weight=WEIGHT[:0], bias=BIAS[:0])),
    ("bias", lambda: _tokens(bias=BIAS[1:])),
]


@pytest.mark.parametrize("name, call", BAD)
def test_bad_input_names_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        call()
