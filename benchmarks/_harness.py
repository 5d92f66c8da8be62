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
from _report import STAGES, Failure, commit, environment, note, percentile, print_tables
from _rows import Row, Rows

# Without --warmup and --repeats. "large": full size on a CPU, minutes per round; there the parity check, which has run
# every stage in the timed shapes, is the warm-up.
AUTO_WARMUP = {"small": 1, "large": 0, "cuda": 3}
AUTO_SECONDS = {"small": 20.0, "large": 150.0, "cuda": 60.0}  # timed part, all rows together
AUTO_LIMITS = {"small": (2, 20), "large": (2, 5), "cuda": (5, 30)}


def measure(rows: Rows, settings: Settings) -> str:
    """Warm-up, timed runs (A B C A B C: drift hits all rows equally), then instrumented runs for the stages. Fills the
    rows in; returns a sentence on how often each was run."""
    on_cpu = settings.work.device == "cpu"
    kind = "cuda" if not on_cpu else "small" if settings.work.preset == "shapes" else "large"
    warmup = settings.warmup if settings.warmup is not None else AUTO_WARMUP[kind]
    lengths: dict[str, float] = {}
    for i in range(warmup):
        note(f"warm-up {i + 1} of {warmup}")
        lengths = rows.call("run", 1_000_000 + i)
    if settings.repeats is not None:
        repeats, chosen = settings.repeats, ""
    else:
        low, high = AUTO_LIMITS[kind]
        seconds = sum(lengths.values())
        repeats = max(low, min(high, int(AUTO_SECONDS[kind] / seconds))) if seconds else low
        reason = f"one round takes {seconds:.3g} s" if seconds else f"the least for {kind} work"
        chosen = f" (chosen: {reason}; --repeats overrides)"
    rows.call("reset_peak")
    longest = 0.0
    for i in range(repeats):
        note(f"timed round {i + 1} of {repeats}")
        answers = rows.call("run", i)
        longest = max(longest, sum(answers.values()))
        for row, seconds in answers.items():
            row.seconds.append(seconds)
    for row, peak in rows.call("peak").items():
        row.peak = peak
    instrumented = min(repeats, 5, int(AUTO_SECONDS["small"] / longest) or 1) if longest else 1
    for i in range(instrumented):
        note(f"instrumented round {i + 1} of {instrumented}")
        for row, stages in rows.call("run_stages", 2_000_000 + i).items():
            row.stages.append(stages)
    return f"{warmup} warm-up, {repeats} timed{chosen}, {instrumented} instrumented runs per row, interleaved"


def result_of(row: Row, batch: int) -> dict[str, Any]:
    """The row's entry of the JSON line; an unavailable row has nulls and the reason."""
    if row.unavailable is not None:
        numbers = dict.fromkeys(("median_s", "p20_s", "p80_s", "images_per_s", "peak_bytes"))
        return {"name": row.name, "dtype": row.spec.dtype, **numbers, "stages": {}, "unavailable": row.unavailable}
    median = statistics.median(row.seconds)
    return {
        "name": row.name,
        "dtype": row.spec.dtype,
        "median_s": median,
        "p20_s": percentile(row.seconds, 0.2),
        "p80_s": percentile(row.seconds, 0.8),
        "images_per_s": batch / median,
        "peak_bytes": row.peak,
        "stages": {s: statistics.median(run.get(s, 0.0) for run in row.stages) for s in STAGES},
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
    rows = Rows()
    try:
        note(f"starting {', '.join(spec.name for spec in settings.rows)}")
        rows.all = [Row(spec, settings.work) for spec in settings.rows]
        names = rows.call("build")
        if not names:
            raise Failure("no row could be built")
        work, name = settings.work, next(iter(names.values()))
        print(
            f"{settings.benchmark}: {work.preset}, {work.width} x {work.height} px, batch {work.batch}, "
            f"{work.steps} steps, prompt of {work.prompt_tokens} tokens, {name}"
        )
        note("checking parity (compiled rows compile now)")
        check_parity(rows, settings)
        runs = measure(rows, settings)
        if not rows.able:
            raise Failure("no row could be run: " + "; ".join(f"{r.name}: {r.unavailable}" for r in rows.all))
        results = [result_of(row, work.batch) for row in rows.all]
    except Failure as failure:
        note(f"{benchmark}.py: error: {failure}")
        return 1
    finally:
        for row in rows.all:
            row.close()
    print(runs)
    print_tables(results, settings)
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
        }
    )
    if settings.json is not None:
        write_atomically(settings.json, lambda path: path.write_text(line + "\n"))
    print()
    print(line)
    return 0
