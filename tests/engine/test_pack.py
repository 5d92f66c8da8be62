"""Packed weights are made anew when the module changes, and only then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcar_fast.engine.pack import forget, packed


def module(dtype: torch.dtype = torch.float32) -> nn.Module:
    made = nn.Sequential(nn.Conv2d(3, 64, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(64)).to(dtype)
    made[0].register_buffer("gap", torch.randn(6, 40)[:, ::2])
    made[0].register_buffer("empty", torch.empty(0))
    made[0].register_buffer("flags", torch.zeros(3, dtype=torch.bool))
    return made


def build(found: nn.Module) -> object:
    return object()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kept_while_nothing_changes(dtype: torch.dtype) -> None:
    made = module(dtype)
    made[0].bias.data.fill_(float("nan"))
    first = packed(made, "kind", build)
    assert packed(made, "kind", build) is first
    made.eval().requires_grad_(False)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert packed(made, "kind", build) is first
    assert packed(made, "other kind", build) is not first


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "0.gap", "0.flags", "1.running_mean", "1.num_batches_tracked"])
def test_writes_that_no_version_counts(name: str) -> None:
    made = module()
    first, tensor = packed(made, "kind", build), made.state_dict(keep_vars=True)[name]
    version = tensor._version
    tensor.data.copy_(~tensor.data if tensor.dtype == torch.bool else tensor.data + 1)
    assert tensor._version == version
    second = packed(made, "kind", build)
    assert second is not first and packed(made, "kind", build) is second


def test_one_row_or_column_of_a_small_tensor_is_seen() -> None:
    made = module()
    first = packed(made, "kind", build)
    made[0].weight.data[:, 1] += 1
    assert packed(made, "kind", build) is not first


def test_forget() -> None:
    made = module()
    whole, part = packed(made, "kind", build), packed(made[0], "kind", build)
    forget(made)
    assert packed(made, "kind", build) is not whole and packed(made[0], "kind", build) is not part
