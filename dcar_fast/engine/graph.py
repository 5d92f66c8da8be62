"""CUDA graphs of whole functions: captured once per key, replayed with new inputs.

A captured function reads its inputs from buffers that belong to the graph and leaves its results in memory that the
next replay overwrites, so both are copied. All graphs of a GPU share one memory pool, so one runs at a time.
"""

from __future__ import annotations

import gc
import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from weakref import WeakSet

import torch
from torch import Tensor

from dcar_fast.engine import buckets

logger = logging.getLogger(__name__)

Function = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
LIMIT = 24  # graphs kept by default: each holds its buffers, and a pool grows to the largest of them
WARM_UP = 2  # calls before a capture: kernels are compiled and libraries choose their algorithms


@dataclass
class Captured:
    """A graph, the buffers that it reads and the tensors that it leaves its results in."""

    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    kept: object = None  # what else the graph reads: it holds addresses, not tensors


class CaptureError(RuntimeError):
    """A function cannot be captured; the reason is in the message."""


class Recorder(ABC):
    """What records and replays; all :class:`Graphs` of one recorder take turns and share its memory."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: WeakSet[Graphs] = WeakSet()

    @abstractmethod
    def record(self, function: Function, inputs: dict[str, Tensor]) -> Captured:
        """``function`` captured with these buffers."""

    @abstractmethod
    def replay(self, captured: Captured, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Results for other values of the inputs, which belong to the caller."""

    @abstractmethod
    def free(self) -> None:
        """Gives what dropped graphs held back to the device."""

    def settle(self) -> None:  # noqa: B027 - optional: what replays at once has nothing to wait for
        """Waits for all replays: their graph's buffers are about to become somebody else's memory."""


class CudaRecorder(Recorder):
    """Captures with ``torch.cuda.CUDAGraph``, everything on one device and from one memory pool."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.done: torch.cuda.Event | None = None
        # One stream for everything that is recorded: libraries keep a workspace for every stream that they meet, and
        # torch's own capture stream belongs to the GPU on which somebody captured first.
        self.stream = torch.cuda.Stream(device)
        self._broken: list[torch.cuda.CUDAGraph] = []

    def record(self, function: Function, inputs: dict[str, Tensor]) -> Captured:
        """Runs ``function`` on ``inputs`` a few times, then captures it. Other threads may use the GPU meanwhile."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # left even where ending a capture fails, unlike torch.cuda.graph's
                for _ in range(WARM_UP):
                    function(inputs)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                try:
                    with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                        outputs = function(inputs)
                except BaseException:
                    self._abandon(graph)
                    raise
        return Captured(inputs, outputs, graph.replay)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a capture that broke: torch may not have ended it, and then its allocator would go on serving it, free
        nothing any more, and refuse the next capture in this pool."""
        index = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(index, self.pool)
        except RuntimeError:
            return  # it has been ended
        torch._C._cuda_releasePool(index, self.pool)
        self._broken.append(graph)  # what serves pinned memory still looks at it
        self.pool = torch.cuda.graph_pool_handle()

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def replay(self, captured: Captured, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Copies, replays, copies, all on the current stream and after what another stream replayed before."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self.done is not None:
                stream.wait_event(self.done)
            outputs = run(captured, inputs)
            self.done = stream.record_event()
        return outputs

    def free(self) -> None:
        gc.collect()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self.pool, self.done = torch.cuda.graph_pool_handle(), None


def cuda_recorder(device: torch.device) -> CudaRecorder:
    """The one recorder of a GPU."""
    with _lock:  # a cache alone may make two when two threads ask at once
        return _recorder(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)


_lock = threading.Lock()
_recorder = cache(CudaRecorder)


class Graphs:
    """Graphs by key, at most ``limit`` of them: the one that was not used for the longest time goes first.

    Calls from several threads take turns.
    """

    def __init__(self, recorder: Recorder, limit: int = LIMIT) -> None:
        self.recorder, self.limit = recorder, limit
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()
        recorder.users.add(self)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._captured

    def __len__(self) -> int:
        return len(self._captured)

    def run(
        self, key: Hashable, function: Function, inputs: Mapping[str, Tensor], kept: object = None
    ) -> tuple[Tensor, ...]:
        """``function(inputs)``, captured when ``key`` is new. The key must name everything that ``function`` depends on
        beside the values of the inputs, their shapes included. The results belong to the caller. kept: tensors that
        ``function`` reads and that somebody else might let go; the function itself is not kept, for it may hold on to
        the owner of these graphs.

        Where memory runs out, all graphs of the recorder are dropped and the capture is tried once more;
        ``torch.OutOfMemoryError`` if that fails too, with everything freed. ``CaptureError`` if the function does what
        a graph cannot hold.
        """
        with self.recorder.lock:
            captured = self._captured.get(key)
            if captured is None:
                captured = self._capture(key, function, inputs)
                captured.kept = kept
            self._captured.move_to_end(key)
            return self.recorder.replay(captured, inputs)

    def clear(self) -> None:
        """Drops all graphs and frees their memory."""
        with self.recorder.lock:
            self.recorder.settle()
            self._captured.clear()
            self.recorder.free()

    def _capture(self, key: Hashable, function: Function, inputs: Mapping[str, Tensor]) -> Captured:
        if len(self._captured) >= self.limit:
            self.recorder.settle()
        while len(self._captured) >= self.limit:
            oldest, _ = self._captured.popitem(last=False)
            logger.info("the graph of %s makes room", oldest)
        captured, shortage = self._try(function, inputs)
        others = sum(len(user) for user in self.recorder.users)
        if captured is None and others:
            logger.warning("no memory to capture %s beside %d other graphs: they are dropped", key, others)
            self.recorder.settle()
            for user in self.recorder.users:
                user._captured.clear()
            self.recorder.free()
            captured, shortage = self._try(function, inputs)
        if captured is None:
            self.recorder.free()
            raise torch.OutOfMemoryError(f"no memory to capture {key}: {shortage}")
        self._captured[key] = captured
        logger.info("captured %s", key)
        return captured

    def _try(self, function: Function, inputs: Mapping[str, Tensor]) -> tuple[Captured | None, str]:
        """What was captured, or None and how memory ran out. The exception is gone when this returns, and with it the
        frames that held on to tensors."""
        try:
            with torch.inference_mode(False), torch.no_grad():  # else callers outside of it could not write the buffers
                return self.recorder.record(function, {name: value.clone() for name, value in inputs.items()}), ""
        except RuntimeError as error:
            shortage = _shortage(error)
            if shortage is None:
                raise CaptureError(f"{type(error).__name__}: {error}") from error
            return None, str(shortage)


def _shortage(error: BaseException | None) -> BaseException | None:
    """Where memory ran out, in the error or below it: ending the broken capture may raise another one over it. Only
    torch's allocator has a type for it; instantiating a graph, loading a kernel and cuBLAS say it in words."""
    while error is not None:
        words = ("out of memory", "STATUS_ALLOC_FAILED")
        if isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words):
            return error
        error = error.__context__
    return None


class GraphedFunction:
    """A function of tensors whose first axis is the batch: captured per bucket of it, in pieces of at most sixteen.

    What cannot be captured runs as it is, and the log says why once; ``torch.OutOfMemoryError`` comes through.
    """

    def __init__(self, name: str, function: Function, device: torch.device) -> None:
        self.name, self.function = name, function
        self.graphs = Graphs(cuda_recorder(device))
        self.failed: str | None = None
        self.too_large: set[torch.Size] = set()  # shapes for which there was no memory, for the caller to keep

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """``function(inputs)``; the values of rows do not depend on each other."""
        if self.failed is None:
            try:
                batch = len(next(iter(inputs.values())))
                found = [self._part({name: x[rows] for name, x in inputs.items()}) for rows in buckets.parts(batch)]
                return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))
            except CaptureError as error:
                self.failed = str(error)
                logger.warning("%s runs without a CUDA graph: capturing failed (%s)", self.name, error)
        return self.function(inputs)

    def _part(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        batch = len(next(iter(inputs.values())))
        more = buckets.batch_bucket(batch) - batch
        padded = {name: torch.cat((x, x[:1].expand(more, *x.shape[1:]))) if more else x for name, x in inputs.items()}
        key = tuple((name, x.shape, x.dtype) for name, x in padded.items())
        return tuple(value[:batch] for value in self.graphs.run(key, self.function, padded))


def run(captured: Captured, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """One replay on the current stream."""
    for name, buffer in captured.inputs.items():
        buffer.copy_(inputs[name], non_blocking=True)
    captured.replay()
    return tuple(value.clone() for value in captured.outputs)
