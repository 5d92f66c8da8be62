"""Named stages of the samplers and the pipeline: NVTX ranges, ranges of torch's profiler, times; all off by default.

``stage(name)`` costs one attribute look-up and nothing else while none is on. A stage is a range of the host's work: in
what a CUDA graph replays the ranges are no longer seen, so whoever replays asks :func:`recording` and runs the stages
one by one while somebody wants to see them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

Ranges = Callable[[str, int | None], object]

_OFF = nullcontext()
_ranges: Ranges | None = None


def stage(name: str, index: int | None = None):
    """Context of one stage: "text", "unmask" (index = step), "final_forward", "head", inside it "denoise" (index = step
    in drawing order), or "decode"."""
    return _OFF if _ranges is None else _ranges(name, index)


def recording() -> bool:
    """Whether somebody records the stages just now."""
    return _ranges is not None


class StageTimes:
    """Seconds per stage name, summed over its occurrences, between :meth:`clear` calls. A stage inside another one is
    part of it: stopping for each of them would slow both."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._synchronize = synchronize
        self._inside = False

    def clear(self) -> None:
        self.seconds.clear()

    @contextmanager
    def span(self, name: str, index: int | None) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._synchronize()
        self._inside, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._inside = False
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
    """Marks the stages inside the block for Nsight Systems and Nsight Compute, as ranges of the default domain: "text",
    "unmask 3", "head", "denoise 17", "decode". ``ValueError`` without a CUDA build of torch and without ``nvtx``."""
    with _install(_nvtx_range()):
        yield


@contextmanager
def trace_ranges() -> Iterator[None]:
    """Marks the stages inside the block in the traces of ``torch.profiler``, under the same names."""
    from torch.profiler import record_function

    with _install(lambda name, index: record_function(label(name, index))):
        yield


def label(name: str, index: int | None) -> str:
    """A stage's name in a profile."""
    return name if index is None else f"{name} {index}"


def _nvtx_range() -> Ranges:
    import torch

    if torch.cuda.is_available():
        return lambda name, index: torch.cuda.nvtx.range(label(name, index))
    try:
        import nvtx
    except ImportError:
        raise ValueError("NVTX ranges need a CUDA build of torch and a GPU, or the nvtx package") from None
    return lambda name, index: nvtx.annotate(label(name, index))


@contextmanager
def _install(ranges: Ranges) -> Iterator[None]:
    global _ranges
    previous, _ranges = _ranges, ranges
    try:
        yield
    finally:
        _ranges = previous
