"""Named stages of the samplers and the pipeline: NVTX ranges and wall-clock times, both off by default.

``stage(name)`` costs one attribute look-up and nothing else while neither is on.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

_OFF = nullcontext()
_ranges: Callable[[str, int | None], object] | None = None


def stage(name: str, index: int | None = None):
    """Context of one stage: "text", "unmask" (index = step), "final_forward", "head" or "decode"."""
    return _OFF if _ranges is None else _ranges(name, index)


class StageTimes:
    """Seconds per stage name, summed over its occurrences, between :meth:`clear` calls."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronize = synchronize

    def clear(self) -> None:
        self.seconds.clear()

    @contextmanager
    def span(self, name: str, index: int | None) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.seconds[name] += time.perf_counter() - start


@contextmanager
def record_stages(synchronize: Callable[[], None] = lambda: None) -> Iterator[StageTimes]:
    """Times the stages inside the block. Pass ``torch.cuda.synchronize`` on a GPU: kernels run asynchronously."""
    times = StageTimes(synchronize)
    with _install(times.span):
        yield times


@contextmanager
def nvtx_ranges() -> Iterator[None]:
    """Marks the stages inside the block for Nsight Systems and Nsight Compute, through ``nvtx`` if installed."""
    with _install(_nvtx_range()):
        yield


def _nvtx_range() -> Callable[[str, int | None], object]:
    def label(name: str, index: int | None) -> str:
        return name if index is None else f"{name} {index}"

    try:
        import nvtx
    except ImportError:
        import torch

        if not torch.cuda.is_available():
            raise ValueError("NVTX ranges need the nvtx package or a CUDA build of torch; install nvtx") from None
        return lambda name, index: torch.cuda.nvtx.range(label(name, index))
    return lambda name, index: nvtx.annotate(label(name, index), domain="dcar_fast")


@contextmanager
def _install(ranges: Callable[[str, int | None], object]) -> Iterator[None]:
    global _ranges
    previous, _ranges = _ranges, ranges
    try:
        yield
    finally:
        _ranges = previous
