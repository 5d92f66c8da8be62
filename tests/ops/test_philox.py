"""The sampling noise in C++, CUDA and Triton has the reference's words. (The reference itself: tests/test_noise.py; in
Triton's interpreter: tests/kernels/interpreted/test_philox.py.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcar_fast.ops import _native
from tests.ops.philox_cases import KNOWN_ANSWERS, arbitrary, check_triton, reference_words


@pytest.fixture(params=["native", pytest.param("cuda", marks=pytest.mark.gpu)])
def words(request: pytest.FixtureRequest):
    """counters (count, 4), keys (count, 2), int64 -> words (count, 4), int64."""
    device = {"native": "cpu", "cuda": "cuda"}[request.param]
    usable = (_native.cpu_usable if device == "cpu" else _native.cuda_usable)(torch.device(device))
    if not usable.ok:
        pytest.skip(usable.reason)

    def draw(counters: Tensor, keys: Tensor) -> Tensor:
        counters, keys = (x.to(torch.uint32).contiguous().to(device) for x in (counters, keys))
        out = torch.full((len(counters), 4), 7, dtype=torch.uint32, device=device)
        arrays = {"counters": counters.data_ptr(), "keys": keys.data_ptr(), "words": out.data_ptr()}
        if device == "cpu":
            _native.module().philox(**arrays, count=len(counters))
        else:
            stream = torch.cuda.current_stream().cuda_stream
            _native.module().philox_cuda(**arrays, count=len(counters), stream=stream)
        return out.cpu().to(torch.int64)

    return draw


def test_known_answers(words) -> None:
    counters, keys, answers = (torch.tensor(column) for column in zip(*KNOWN_ANSWERS, strict=True))
    assert torch.equal(words(counters, keys), answers)


def test_words_are_the_references(words) -> None:
    counters, keys = arbitrary(5000)
    assert torch.equal(words(counters, keys), reference_words(counters, keys))
    assert words(counters[:0], keys[:0]).shape == (0, 4)


@pytest.mark.gpu
def test_triton_on_a_gpu() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from tests.ops.philox_probe import draw

    check_triton(draw, "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "count is -1"),
        ({"counters": 0}, "counters is a null pointer"),
        ({"keys": 2}, "keys is not aligned to 4"),
        ({"words": 0}, "words is a null pointer"),
        ({"count": 2**61}, "words has more elements"),
    ],
)
def test_bindings_check_before_they_touch_memory(change, message) -> None:
    if not (usable := _native.cpu_usable(torch.device("cpu"))).ok:
        pytest.skip(usable.reason)
    with pytest.raises(ValueError, match=message):
        _native.module().philox(**{"counters": 8, "keys": 8, "words": 8, "count": 1, **change})
