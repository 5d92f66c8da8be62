"""The CPU ops under pytest-benchmark: every backend that can run here, at the sizes of the full model at 512 px.

    python -m pytest benchmarks/kernels/cpu.py --benchmark-group-by=group [--benchmark-autosave --benchmark-compare]

For histories and comparisons between commits; ``benchmarks/kernels/<op>.py`` times an op against what PyTorch offers,
in turns. Results are checked against the reference before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dcar_fast import ops
from dcar_fast.ops import TokenNoise

IMAGES, TOKENS, CODES, CHANNELS = 2, 256, 16384, 32


def vq_lookup() -> Callable[[str], object]:
    z, codebook = torch.randn(IMAGES * TOKENS, CHANNELS), torch.randn(CODES, CHANNELS)
    return lambda backend: ops.vq_lookup(z, codebook, backend=backend)[0]


def add_residual() -> Callable[[str], object]:
    ids, codebook = torch.randint(0, CODES, (IMAGES, 16, 16)), torch.randn(CODES, CHANNELS)
    residual = torch.randn(IMAGES, TOKENS, CHANNELS)
    return lambda backend: ops.add_residual(ids, codebook, residual, dtype=torch.float32, backend=backend)


def remask() -> Callable[[str], object]:
    ids, confidence = torch.randint(0, CODES, (IMAGES, TOKENS)), torch.randn(IMAGES, TOKENS)
    counts = torch.tensor([100, 200])
    return lambda backend: ops.remask(ids, confidence, counts, CODES, backend=backend)


def sample_from_logits() -> Callable[[str], object]:
    cond, uncond = torch.randn(64, CODES), torch.randn(64, CODES)
    noise = TokenNoise(torch.full((64,), 7), torch.arange(64), 0)
    settings = {"guidance": 4.5, "softmax_temperature": 1.2, "tau": 1.4, "noise": noise}
    return lambda backend: ops.sample_from_logits(cond, uncond, **settings, backend=backend)[0]


CASES = {make.__name__: make for make in (add_residual, remask, sample_from_logits, vq_lookup)}
BACKENDS = [(op, name) for op in CASES for name, usable in ops.report("cpu")[op].items() if usable.ok]


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_op(op: str, backend: str, benchmark) -> None:
    torch.manual_seed(0)
    call = CASES[op]()
    torch.testing.assert_close(call(backend), call("reference"), rtol=0, atol=1e-6)
    benchmark.group = op
    benchmark(call, backend)
