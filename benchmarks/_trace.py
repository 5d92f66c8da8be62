"""A trace of torch's profiler over a few runs of one row, to open in https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from dcar_fast._files import write_atomically
from dcar_fast.profiling import trace_ranges

if TYPE_CHECKING:
    from _session import Session

# (name of the range, stages marked) of each run; the first warms the profiler up and is not kept
RUNS = (("warm-up", True), ("run as timed", False), ("run by stages", True))
LONGEST = 25  # rows of the table


def trace(session: Session, path: Path) -> str:
    """Writes ``path`` (.json.gz): one run as it is timed, and one with its stages marked, which where runs are captured
    in a CUDA graph means without it. Returns the table of the operations or kernels that took longest in both."""
    on_gpu = session.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    tables: list[str] = []

    def keep(found: profile) -> None:
        write_atomically(path, lambda temporary: _export(found, temporary))
        averages = found.key_averages()
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        tables.append(averages.table(sort_by=order, row_limit=LONGEST, max_name_column_width=60))

    steps = schedule(wait=0, warmup=1, active=len(RUNS) - 1, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=keep, acc_events=True) as profiler:
        for index, (name, stages) in enumerate(RUNS):
            with record_function(name), trace_ranges() if stages else nullcontext():
                session.run(4_000_000 + index)
            profiler.step()
    return "\n".join(tables)


def _export(found: profile, path: Path) -> None:
    """torch looks at the name's end to know whether to compress."""
    compressed = path.with_name(f"{path.name}.json.gz")
    try:
        found.export_chrome_trace(str(compressed))
        compressed.replace(path)
    finally:
        compressed.unlink(missing_ok=True)
