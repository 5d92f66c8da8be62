"""Captured calls: buffers, results, keys, the limit, threads, and memory that runs out; with a recorder that replays by
calling the function again, and on a GPU with real graphs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dcar_fast.engine import buckets
from dcar_fast.engine.graph import Captured, CaptureError, CudaRecorder, GraphedFunction, Graphs, run
from dcar_fast.engine.graph import Recorder as Base


class Recorder(Base):
    """Stands in for CUDA graphs: a replay calls the function on the buffers and leaves its results where they were."""

    def __init__(self, shortages: int = 0) -> None:
        super().__init__()
        self.recorded = self.freed = 0
        self.shortages = shortages

    def record(self, function, inputs: dict[str, Tensor]) -> Captured:
        if self.shortages:
            self.shortages -= 1
            raise torch.OutOfMemoryError("no memory")
        self.recorded += 1
        outputs = tuple(value.clone() for value in function(inputs))

        def replay() -> None:
            for kept, new in zip(outputs, function(inputs), strict=True):
                kept.copy_(new)

        return Captured(inputs, outputs, replay)

    def replay(self, captured: Captured, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return run(captured, inputs)

    def free(self) -> None:
        self.freed += 1


def double(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return inputs["x"] * 2, inputs["x"].sum()


def test_new_inputs_new_results_and_nobody_elses_memory() -> None:
    graphs = Graphs(Recorder())
    x = torch.arange(4.0)
    first = graphs.run("k", double, {"x": x})
    second = graphs.run("k", double, {"x": x + 10})
    assert torch.equal(first[0], x * 2) and torch.equal(second[0], (x + 10) * 2)
    assert first[1] == 6 and second[1] == 46
    second[0].zero_()
    assert torch.equal(graphs.run("k", double, {"x": x})[0], x * 2)
    assert torch.equal(x, torch.arange(4.0)), "the caller's inputs are left alone"
    assert graphs.recorder.recorded == 1


def test_a_graph_per_key_and_the_longest_unused_one_goes_first() -> None:
    graphs = Graphs(Recorder(), limit=2)
    for key in ("a", "b", "a", "c"):
        graphs.run(key, double, {"x": torch.ones(2)})
    assert len(graphs) == 2 and "a" in graphs and "c" in graphs and "b" not in graphs
    assert graphs.recorder.recorded == 3
    graphs.clear()
    assert len(graphs) == 0 and graphs.recorder.freed == 1


def test_no_memory_beside_others_drops_them_and_tries_again() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    graphs.run("a", double, {"x": torch.ones(2)})
    recorder.shortages = 1
    assert torch.equal(graphs.run("b", double, {"x": torch.ones(2)})[0], torch.full((2,), 2.0))
    assert "a" not in graphs and "b" in graphs and recorder.freed == 1


def test_memory_is_shared_with_the_recorders_other_graphs() -> None:
    recorder = Recorder()
    decoder, sampler = Graphs(recorder), Graphs(recorder)
    decoder.run("a", double, {"x": torch.ones(2)})
    recorder.shortages = 1
    assert sampler.run("b", double, {"x": torch.ones(2)})[1] == 2
    assert len(decoder) == 0 and len(sampler) == 1


def graphed(function, recorder: Recorder, monkeypatch) -> GraphedFunction:
    monkeypatch.setattr("dcar_fast.engine.graph.cuda_recorder", lambda device: recorder)
    return GraphedFunction("it", function, torch.device("cuda"))


@pytest.mark.parametrize("batch", [1, 3, 16, 17, 40])
def test_a_graphed_function_pads_and_cuts(batch: int, monkeypatch) -> None:
    recorder, sizes = Recorder(), []

    def rows(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        sizes.append(len(inputs["x"]))
        return inputs["x"] + inputs["y"][:, None], inputs["y"] * 3

    function = graphed(rows, recorder, monkeypatch)
    x, y = torch.arange(2.0 * batch).view(batch, 2), torch.arange(batch)
    for _ in range(2):
        total, triple = function({"x": x, "y": y})
        assert torch.equal(total, x + y[:, None]) and torch.equal(triple, y * 3)
    assert set(sizes) <= set(buckets.BATCHES)
    assert recorder.recorded == len({buckets.batch_bucket(part.stop - part.start) for part in buckets.parts(batch)})


def test_a_graphed_function_that_cannot_be_captured_runs_as_it_is(monkeypatch, caplog) -> None:
    recorder = Recorder()
    monkeypatch.setattr(recorder, "record", lambda *_: (_ for _ in ()).throw(RuntimeError("not permitted")))
    function = graphed(double, recorder, monkeypatch)
    for _ in range(2):
        assert function({"x": torch.ones(3)})[1] == 3
    assert caplog.text.count("it runs without a CUDA graph: capturing failed (RuntimeError: not permitted)") == 1


def test_a_graphed_function_without_memory_says_so(monkeypatch) -> None:
    function = graphed(lambda inputs: (inputs["x"] * 2,), Recorder(shortages=1), monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        function({"x": torch.ones(3)})
    assert torch.equal(function({"x": torch.ones(3)})[0], torch.full((3,), 2.0))


def test_no_memory_at_all_is_an_error_that_leaves_nothing_behind() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    graphs.run("a", double, {"x": torch.ones(2)})
    recorder.shortages = 2
    with pytest.raises(torch.OutOfMemoryError, match="no memory to capture b: no memory"):
        graphs.run("b", double, {"x": torch.ones(1000)})
    assert len(graphs) == 0 and recorder.freed == 2
    assert graphs.run("small", double, {"x": torch.ones(1)})[1] == 1


def test_memory_that_ran_out_below_another_error() -> None:
    """Ending a capture that was broken off raises an error of its own."""
    recorder = Recorder()

    def broken(function, inputs):
        try:
            raise torch.OutOfMemoryError("too large")
        except torch.OutOfMemoryError:
            raise RuntimeError("capture was invalidated")  # noqa: B904 - as torch does

    recorder.record = broken
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        Graphs(recorder).run("a", double, {"x": torch.ones(1)})


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_memory_that_ran_out_elsewhere(words: str) -> None:
    """Graphs, kernels and cuBLAS take memory that torch's allocator knows nothing of."""
    recorder = Recorder()
    recorder.record = lambda *_: (_ for _ in ()).throw(RuntimeError(words))
    with pytest.raises(torch.OutOfMemoryError, match=words):
        Graphs(recorder).run("a", double, {"x": torch.ones(1)})


def test_a_function_that_was_captured_may_go() -> None:
    """It holds on to the engine, and the engine to its graphs."""

    class Once(Recorder):
        def record(self, function, inputs: dict[str, Tensor]) -> Captured:
            return Captured(inputs, function(inputs), lambda: None)

    def function(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (inputs["x"] * 2,)

    graphs, seen = Graphs(Once()), weakref.ref(function)
    graphs.run("a", function, {"x": torch.ones(1)})
    del function
    assert seen() is None and "a" in graphs


def test_what_was_captured_in_inference_mode_serves_outside_of_it() -> None:
    graphs = Graphs(Recorder())
    with torch.inference_mode():
        graphs.run("a", double, {"x": torch.ones(2)})
    assert graphs.run("a", double, {"x": torch.full((2,), 3.0)})[1] == 6
    with torch.inference_mode():
        assert graphs.run("a", double, {"x": torch.full((2,), 4.0)})[1] == 8


@pytest.mark.parametrize("ended", [True, False])
def test_a_broken_capture_is_ended_for_the_allocator(ended: bool, monkeypatch) -> None:
    recorder, calls = CudaRecorder.__new__(CudaRecorder), []
    recorder.pool, recorder._broken = "old", []

    def end(index: int, pool: object) -> None:
        calls.append(("end", index, pool))
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *to: calls.append(("release", *to)), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "new")
    recorder._abandon("graph")
    if ended:
        assert calls == [("end", 1, "old")] and recorder.pool == "old" and recorder._broken == []
    else:
        assert calls == [("end", 1, "old"), ("release", 1, "old")]
        assert recorder.pool == "new" and recorder._broken == ["graph"]


def test_what_cannot_be_captured_says_so() -> None:
    recorder = Recorder()

    def unable(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder.record = unable
    graphs = Graphs(recorder)
    with pytest.raises(CaptureError, match="RuntimeError: operation not permitted"):
        graphs.run("a", double, {"x": torch.ones(1)})
    assert "a" not in graphs


def test_threads_take_turns() -> None:
    graphs, wrong = Graphs(Recorder(), limit=3), []

    def work(number: int) -> None:
        for i in range(50):
            x = torch.full((3,), float(100 * number + i))
            found = graphs.run(i % 5, double, {"x": x})
            if not torch.equal(found[0], x * 2):
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(("batch", "bucket"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (16, 16), (17, 16)])
def test_batch_buckets(batch: int, bucket: int) -> None:
    assert buckets.batch_bucket(batch) == bucket


@pytest.mark.parametrize(
    ("length", "longest", "bucket"),
    [(0, 300, 32), (32, 300, 32), (33, 300, 64), (128, 300, 128), (129, 300, 300), (5, 12, 12), (40, 128, 64)],
)
def test_length_buckets(length: int, longest: int, bucket: int) -> None:
    assert buckets.length_bucket(length, longest) == bucket


def test_parts_cover_the_batch() -> None:
    assert buckets.parts(16) == [slice(0, 16)]
    assert buckets.parts(35) == [slice(0, 16), slice(16, 32), slice(32, 35)]


@pytest.mark.parametrize("sizes", [[], [0], [17], [1.0], ["a"], [True]])
def test_sizes_that_are_none(sizes: list) -> None:
    with pytest.raises(ValueError, match=r"batches must be integers in 1\.\.16, got"):
        buckets.check_sizes("batches", sizes, 16)


@pytest.mark.gpu
def test_real_graphs() -> None:
    graphs = Graphs(CudaRecorder(torch.device("cuda")), limit=2)
    for n in (3, 1000, 3, 5, 1000, 3):
        x = torch.randn(n, device="cuda")
        doubled, total = graphs.run(n, double, {"x": x})
        assert torch.equal(doubled, x * 2) and torch.allclose(total, x.sum())
    assert len(graphs) == 2


@pytest.mark.gpu
def test_real_graphs_survive_a_lack_of_memory() -> None:
    graphs = Graphs(CudaRecorder(torch.device("cuda")))
    graphs.run("small", double, {"x": torch.ones(4, device="cuda")})
    total = torch.cuda.get_device_properties(0).total_memory

    def greedy(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (torch.empty(2 * total, dtype=torch.uint8, device="cuda"),)

    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("greedy", greedy, {"x": torch.ones(4, device="cuda")})
    assert len(graphs) == 0
    assert graphs.run("small", double, {"x": torch.ones(4, device="cuda")})[1] == 4


@pytest.mark.gpu
def test_real_graphs_refuse_to_wait_for_the_host() -> None:
    graphs = Graphs(CudaRecorder(torch.device("cuda")))

    def waits(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (inputs["x"] * inputs["x"].sum().item(),)

    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(CaptureError):
            graphs.run("waits", waits, {"x": torch.ones(4, device="cuda")})
        assert torch.cuda.current_stream() == stream
    assert graphs.run("works", double, {"x": torch.ones(4, device="cuda")})[1] == 4


@pytest.mark.gpu
def test_real_graphs_survive_a_lack_of_memory_that_only_the_capture_meets() -> None:
    graphs = Graphs(CudaRecorder(torch.device("cuda")))
    total = torch.cuda.get_device_properties(0).total_memory

    def greedy(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        room = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # freed again, with the graph's pool
        size = 2 * total if torch.cuda.is_current_stream_capturing() else 1
        return inputs["x"] * 2, room[:1], torch.empty(size, dtype=torch.uint8, device="cuda")

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("greedy", greedy, {"x": torch.ones(4, device="cuda")})
    assert torch.cuda.memory_reserved() < before + 2**27
    assert graphs.run("small", double, {"x": torch.ones(4, device="cuda")})[1] == 4
