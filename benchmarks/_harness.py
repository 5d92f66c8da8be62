"""What latency.py and throughput.py share: the parity gate, interleaved timing, tables and the JSON line."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from _arguments import Settings, parse
from _parity import check_parity
from _report import STAGES, Failure, commit, environment, note, percentile, print_tables, threads
from _rows import OwnProcess, Row, RowFailed, Rows, SameProcess

# Without --warmup and --repeats. "large": full size on a CPU, minutes per round; there the parity check, which has run
# every stage in the timed shapes, is the warm-up.
AUTO_WARMUP = {"small": 1, "large": 0, "cuda": 3}
AUTO_SECONDS = {"small": 20.0, "large": 150.0, "cuda": 60.0}  # timed part, all rows together
AUTO_LIMITS = {"small": (2, 20), "large": (2, 5), "cuda": (5, 30)}


def start(rows: Rows, settings: Settings, weights: str) -> str:
    """Builds the rows and makes the first batch of each, one row after the other: what that takes is reported. Returns
    the device's name."""
    kind = OwnProcess if settings.marked is None else SameProcess
    names: dict[Row, str] = {}
    for spec in settings.rows:
        note(f"{spec.name}: loading, and the first batch" + (" (compiles now)" if spec.kind == "compile" else ""))
        row = kind(spec, settings.work, weights)
        rows.all.append(row)
        names |= rows.call("build", among=[row])
        row.first = rows.call("first_image", among=[row]).get(row, {})
    if not rows.able:
        raise Failure("no row could be built: " + "; ".join(f"{r.name}: {r.unavailable}" for r in rows.all))
    return names[rows.able[0]]


def measure(rows: Rows, settings: Settings) -> str:
    """Warm-up, timed runs (A B C A B C: drift hits all rows equally), then instrumented runs for the stages. Fills the
    rows in; returns a sentence on how often each was run."""
    on_cpu = settings.work.device == "cpu"
    kind = "cuda" if not on_cpu else "small" if settings.work.preset == "shapes" else "large"
    warmup = settings.warmup if settings.warmup is not None else AUTO_WARMUP[kind]
    lengths: dict[Row, float] = {}
    for i in range(warmup):
        note(f"warm-up {i + 1} of {warmup}")
        lengths = rows.call("run", 1_000_000 + i)
    repeats, chosen = choose_repeats(settings.repeats, kind, sum(lengths.values()))
    rows.call("reset_peak")
    longest = timed_runs(rows, repeats, settings.marked)
    for row, peak in rows.call("peak").items():
        row.peak = peak
    if settings.marked is not None:
        return f"{warmup} warm-up, {repeats} timed{chosen} runs, which a profiler may have slowed; no stages"
    instrumented = min(repeats, 5, int(AUTO_SECONDS["small"] / longest) or 1) if longest else 1
    for i in range(instrumented):
        note(f"instrumented round {i + 1} of {instrumented}")
        for row, stages in rows.call("run_stages", 2_000_000 + i).items():
            row.stages.append(stages)
    return f"{warmup} warm-up, {repeats} timed{chosen}, {instrumented} instrumented runs per row, interleaved"


def choose_repeats(asked: int | None, kind: str, seconds: float) -> tuple[int, str]:
    """Timed rounds, and why so many. ``seconds``: of a round, 0 if unknown."""
    if asked is not None:
        return asked, ""
    low, high = AUTO_LIMITS[kind]
    repeats = max(low, min(high, int(AUTO_SECONDS[kind] / seconds))) if seconds else low
    reason = f"one round takes {seconds:.3g} s" if seconds else f"the least for {kind} work"
    return repeats, f" (chosen: {reason}; --repeats overrides)"


def timed_runs(rows: Rows, repeats: int, marked: str | None) -> float:
    """``repeats`` runs of every row; the seconds of the longest round. Those of a row that is marked for a profiler
    come in one call, so that nothing else is between the marks."""
    if marked is not None:
        note(f"{repeats} timed runs between the profiler's marks")
        for row, seconds in rows.call("run_range", range(repeats), marked == "stages").items():
            row.seconds += seconds
        return 0.0
    longest = 0.0
    for i in range(repeats):
        note(f"timed round {i + 1} of {repeats}")
        answers = rows.call("run", i)
        longest = max(longest, sum(answers.values()))
        for row, seconds in answers.items():
            row.seconds.append(seconds)
    return longest


def write_trace(rows: Rows, settings: Settings) -> None:
    """Traces the last fast row that works, or the last row, and prints what took longest."""
    row = ([row for row in rows.able if row.spec.kind == "fast"] or rows.able)[-1]
    note(f"tracing {row.name}")
    try:
        text = row.call("trace", str(settings.trace.resolve()))
    except RowFailed as reason:
        raise Failure(f"{row.name} could not be traced: {reason}") from None
    print(f"\n{row.name}, one run as timed and one by stages, in {settings.trace}:\n{text}")


def result_of(row: Row, batch: int) -> dict[str, Any]:
    """The row's entry of the JSON line; an unavailable row has nulls and the reason."""
    if row.unavailable is not None:
        numbers = dict.fromkeys(("median_s", "p20_s", "p80_s", "images_per_s", "peak_bytes"))
        numbers |= {"first_s": None, "first": {}, "stages": {}, "remarks": row.remarks}
        return {"name": row.name, "dtype": row.spec.dtype, **numbers, "unavailable": row.unavailable}
    median = statistics.median(row.seconds)
    return {
        "name": row.name,
        "dtype": row.spec.dtype,
        "median_s": median,
        "p20_s": percentile(row.seconds, 0.2),
        "p80_s": percentile(row.seconds, 0.8),
        "images_per_s": batch / median,
        "peak_bytes": row.peak,
        "first_s": None if None in row.first.values() else sum(row.first.values()),
        "first": row.first,
        "stages": {s: statistics.median(run.get(s, 0.0) for run in row.stages) for s in STAGES} if row.stages else {},
        "remarks": row.remarks,
    }


def main(benchmark: str, batch: int, description: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark from its command line; returns the exit code."""
    settings = parse(benchmark, batch, description, arguments)
    from dcar_fast._files import write_atomically

    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if settings.work.device == "cpu" and load > cores / 2:
        note(
            f"WARNING: the machine has been busy (load {load:.1f} on {cores} cores). Threads that wait for a core "
            "make times many times too long; OMP_NUM_THREADS=N uses N cores alone"
        )
    rows, work = Rows(), settings.work
    try:
        from _weights import weights

        note("weights")
        with weights(work.preset, settings.weights) as folder:
            name = start(rows, settings, folder)
            print(
                f"{settings.benchmark}: {work.preset}, {work.width} x {work.height} px, batch {work.batch}, "
                f"{work.steps} steps, prompt of {work.prompt_tokens} tokens, {name}"
            )
            note("checking parity")
            check_parity(rows, settings, folder)
        runs = measure(rows, settings)
        if not rows.able:
            raise Failure("no row could be run: " + "; ".join(f"{r.name}: {r.unavailable}" for r in rows.all))
        for row, remarks in rows.call("remarks").items():
            row.remarks = remarks
        if settings.trace is not None:
            write_trace(rows, settings)
        results = [result_of(row, work.batch) for row in rows.all]
    except (Failure, OSError, ValueError) as failure:
        note(f"{benchmark}.py: error: {failure}")
        return 1
    finally:
        for row in rows.all:
            row.close()
    line = json.dumps(
        {
            "benchmark": settings.benchmark,
            "preset": work.preset,
            "batch": work.batch,
            "height": work.height,
            "width": work.width,
            "steps": work.steps,
            "device": name,
            "rows": results,
            "versions": environment(work.device),
            "commit": commit(),
            "time": started,
            "command": settings.command,
            "threads": threads(work.device),
        }
    )
    if settings.json is not None:
        write_atomically(settings.json, lambda path: path.write_text(line + "\n"))
    print(runs)
    print_tables(results, settings)
    print()
    print(line)
    broken = [row for row in rows.all if is_broken(row)]
    for row in broken:
        note(f"{benchmark}.py: error: {row.name} should run here: {row.unavailable}")
    return 1 if broken else 0


def is_broken(row: Row) -> bool:
    """A row of the fast sampler that neither ran nor was refused with a reason, nor lacked memory."""
    refusals = ("ValueError", "NotImplementedError", "OutOfMemoryError", "MemoryError")
    if row.spec.kind != "fast" or row.unavailable is None:
        return False
    return not row.unavailable.startswith(refusals) and "out of memory" not in row.unavailable
