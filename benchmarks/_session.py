"""One row of a benchmark, alone in its own process: builds the pipeline, answers parity probes, runs and is timed.

A process per row keeps peak memory, compiled code and allocator state apart; the parent calls the rows in turn.
"""

from __future__ import annotations

import gc
import logging
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _compile import compile_pipeline
from _parity_probe import ParityProbe
from _weights import load
from _work import RowSpec, Workload
from torch import Tensor

from dcar_fast import SamplingConfig
from dcar_fast.noise import Noise, TorchNoise
from dcar_fast.profiling import nvtx_ranges, record_stages


class Session:
    """A row's pipeline and what the parent asks of it. Times are seconds, memory is bytes.

    folder: the pipeline with the weights of all rows. started: ``time.time()`` when this process was started for this
    row alone, None if it was not.
    """

    def __init__(self, spec: RowSpec, work: Workload, folder: str, started: float | None = None) -> None:
        self.spec, self.work, self.folder = spec, work, folder
        self.device = torch.device(work.device)
        self.sampling = SamplingConfig(num_steps=work.steps)
        self.import_seconds = None if started is None else time.time() - started
        self._remarks = Remarks()
        logging.getLogger("dcar_fast").addHandler(self._remarks)

    def remarks(self) -> list[str]:
        """What the package warned of since the start, such as a graph that could not be captured."""
        return self._remarks.found

    # ---- building

    def build(self) -> str:
        """Loads the pipeline, with the same weights in every row; returns the device's name."""
        start = time.perf_counter()
        self.pipeline = load(self.folder, self.spec.base_dtype, self.spec.engine, self.device)
        if self.spec.dtype == "fp8":
            self.pipeline.sampler_dtype = torch.float8_e4m3fn
        self.grid = self.pipeline.grid(self.work.height, self.work.width)
        if self.spec.kind == "compile":
            compile_pipeline(self.pipeline, self.spec.mode, self.grid)
        gc.collect()
        synchronize(self.device)
        self.build_seconds = time.perf_counter() - start
        return device_name(self.device)

    def first_image(self) -> dict[str, float | None]:
        """The first batch of this process, whatever is compiled, packed or captured for it included: {"import_s":
        interpreter and imports, "build_s": weights, "image_s"}."""
        image = self.run(3_000_000)
        return {"import_s": self.import_seconds, "build_s": self.build_seconds, "image_s": image}

    # ---- parity

    @cached_property
    def _probe(self) -> ParityProbe:
        return ParityProbe(self.pipeline, self.spec, self.work, self.grid)

    def record_reference(self, folder: str) -> None:
        """See :meth:`ParityProbe.record_reference`."""
        self._probe.record_reference(folder)

    def parity(self, folder: str) -> dict[str, Any]:
        """See :meth:`ParityProbe.parity`."""
        return self._probe.parity(folder)

    # ---- timing

    def run(self, index: int) -> float:
        """Prompts to pixels on the device, once, with the device idle before and after and no stop in between."""
        prompts, noise = self.inputs(index)
        synchronize(self.device)
        start = time.perf_counter()
        self.images(prompts, noise)
        synchronize(self.device)
        return time.perf_counter() - start

    def run_stages(self, index: int) -> dict[str, float]:
        """The same with a synchronisation around every stage: seconds by stage."""
        prompts, noise = self.inputs(index)
        with record_stages(lambda: synchronize(self.device)) as times:
            self.images(prompts, noise)
        return dict(times.seconds)

    def run_range(self, indices: Sequence[int], stages: bool) -> list[float]:
        """Seconds of these runs, with what Nsight collects switched on for them alone. ``stages``: their stages are
        marked, too."""
        with nvtx_ranges() if stages else nullcontext():
            return run_between_marks(torch.cuda.profiler, lambda: [self.run(index) for index in indices])

    def trace(self, path: str) -> str:
        """Writes a trace of torch's profiler; returns the table of its longest operations."""
        from _trace import trace

        return trace(self, Path(path))

    def inputs(self, index: int) -> tuple[list[str], list[int] | Noise]:
        """Prompts and noise of a run. The baselines draw with torch's own generator: counter noise in plain PyTorch
        would slow them. The fast rows take seeds, as their users do."""
        if self.spec.kind == "fast":
            return self.work.prompts(index), self.work.seeds(index)
        c = self.pipeline.generator.config
        noise = TorchNoise(
            self.work.batch,
            num_tokens=self.grid[0] * self.grid[1],
            codebook_size=c.codebook_size,
            latent_channels=c.latent_channels,
            generator=torch.Generator(self.device).manual_seed(index),
            device=self.device,
        )
        return self.work.prompts(index), noise

    def images(self, prompts: list[str], noise: list[int] | Noise) -> Tensor:
        """(B, H, W, 3) uint8 on the device."""
        text = self.pipeline.encode_text(prompts)
        if text.states.shape[1] != self.work.prompt_tokens:
            raise RuntimeError(f"prompts became {text.states.shape[1]} tokens, not {self.work.prompt_tokens}")
        return self.pipeline.decode(self.pipeline.generate(text, noise, self.sampling, self.grid), self.grid)

    # ---- memory

    def reset_peak(self) -> None:
        """Peak memory counts from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif (clear := Path("/proc/self/clear_refs")).exists():
            clear.write_text("5")  # VmHWM becomes the present resident set

    def peak(self) -> int:
        """torch.cuda.max_memory_allocated and what CUDA graphs hold for their replays, or this process's peak resident
        set."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) + graph_memory(torch.cuda.memory_snapshot())
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Remarks(logging.Handler):
    """Keeps warnings, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.found:
            self.found.append(text)


def graph_memory(segments: Sequence[dict[str, Any]]) -> int:
    """Bytes in the memory pools of CUDA graphs, of torch.cuda.memory_snapshot(), that no tensor has: what a replay
    works in is not counted as allocated."""
    private = [segment for segment in segments if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in private)


def run_between_marks(profiler: Any, runs: Callable[[], list[float]]) -> list[float]:
    """``runs`` between ``profiler.start()`` and ``profiler.stop()``, torch.cuda.profiler's: Nsight collects with
    ``--capture-range=cudaProfilerApi`` (nsys) or ``--profile-from-start off`` (ncu) what happens between the two."""
    profiler.start()
    try:
        return runs()
    finally:
        profiler.stop()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def serve(connection, spec: RowSpec, work: Workload, folder: str, started: float) -> None:
    """The process of a row: answers (method, arguments) with ("ok", result) or ("error", one line, details), until the
    parent is gone."""
    session = Session(spec, work, folder, started)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("ok", getattr(session, method)(*arguments))
        except Exception as error:  # whatever it is, the parent reports it with the row's name
            answer = ("error", *explain(error, spec))
        try:
            connection.send(answer)
        except BrokenPipeError:
            return


def explain(error: Exception, spec: RowSpec) -> tuple[str, str]:
    """One line, and the details."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    # the compiler's own frames say nothing, its message names the line of ours that it stumbled over
    details = str(error) if spec.kind == "compile" else traceback.format_exc()
    return f"{type(error).__name__}: {' '.join(lines[:2])}", details
