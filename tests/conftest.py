"""What every test can rely on: GPU tests skip with a reason, and memory nobody wrote can be made to show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

# The models under test are tiny: threads would only wait for each other, and for other processes on a busy machine.
torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, torch sees none")


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor with what no result should contain: NaN, or the most negative integer."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch.empty and its relatives return poison, so that an output left unwritten fails its test."""

    def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))


@pytest.fixture(params=[torch.float16, torch.float64], ids=str)
def with_default_dtype(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], Any]:
    """Calls a function while torch makes tensors of another type than float32 where none is named."""

    def call(function: Callable[[], Any]) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(before)

    return call
