"""What became of a step, judged by what its command printed and wrote."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple

from _suite.process import Done

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
}


class Outcome(NamedTuple):
    """``status``: "ok", "failed", "unavailable" (cannot run here) or "skipped" (no time)."""

    status: str
    reason: str = ""
    result: Any = None


def finished(done: Done) -> Outcome:
    """Exit status 0 is all that is asked."""
    return Outcome("ok") if done.code == 0 else Outcome("failed", why(done))


def last_json(done: Done) -> Outcome:
    """The last line that is a JSON object is the result."""
    if done.code != 0:
        return Outcome("failed", why(done))
    for line in reversed(done.output.splitlines()):
        if line.startswith("{"):
            try:
                return Outcome("ok", result=json.loads(line))
            except ValueError:
                break
    return Outcome("failed", "it printed no line of JSON")


def why(done: Done) -> str:
    """The line of the output that tells most of a failure."""
    if done.timed_out:
        return f"ran out of its {done.seconds:.0f} s"
    lines = [line.strip() for line in done.output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error", line, re.IGNORECASE)]
    return f"exit status {done.code}: {(errors or lines or ['no output'])[-1][:300]}"


def warmup(done: Done) -> Outcome:
    total = re.findall(r"^\d+ kernels compiled.*$", done.output, re.MULTILINE)
    if done.code == 0 and total:
        return Outcome("ok", total[-1])
    return Outcome("failed", why(done))


def tests(done: Done, report: Path) -> Outcome:
    """Counts and failures of pytest's JUnit file, or of the files of several processes (``_suite.shares``)."""
    cases, read = [], 0
    for file in [report] if report.exists() else sorted(report.parent.glob(f"{report.stem}.*{report.suffix}")):
        try:
            cases += ElementTree.parse(file).getroot().iter("testcase")
        except ElementTree.ParseError:  # cut off while it was written
            continue
        read += 1
    if not read:
        return Outcome("failed", f"pytest left no report: {why(done)}")
    counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    failures = []
    for case in cases:
        kinds = {"failure": "failed", "error": "error", "skipped": "skipped"}
        found = [(kinds[child.tag], child.get("message") or "") for child in case if child.tag in kinds]
        state, message = found[0] if found else ("passed", "")
        counts[state] += 1
        if state in ("failed", "error"):
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": name, "message": message.partition("\n")[0][:300]})
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no test ran"
    good = done.code == 0 and counts["passed"] > 0
    reason = text if good or done.code == 1 else f"{text}; {why(done)}"
    return Outcome("ok" if good else "failed", reason, {"counts": counts, "failures": failures})


def sanitizer(done: Done) -> Outcome:
    """The tool's own summary; a run that was cut off still tells how many tests it saw."""
    if "Device not supported" in done.output:
        return Outcome("unavailable", "compute-sanitizer says: Device not supported")
    summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .+)$", done.output, re.MULTILINE)
    passed = len(re.findall(r" PASSED\b", done.output))
    text = f"{passed} tests passed; {'; '.join(summary) or 'no summary'}"
    if done.timed_out:
        return Outcome("failed", f"{why(done)}; until then {text}")
    clean = done.code == 0 and summary and all(re.search(r"SUMMARY: 0 ", line) for line in summary)
    return Outcome("ok" if clean else "failed", text if done.code in (0, 99) else f"{text}; {why(done)}")


def profile(done: Done) -> Outcome:
    return (
        Outcome("ok", "PyTorch's profiler", {"text": done.output}) if done.code == 0 else Outcome("failed", why(done))
    )


def trace(done: Done) -> Outcome:
    """What latency.py --profile prints between its name for the trace and the table of the rows."""
    found = re.search(r"^(\S+, one run as timed .*?)^row +median", done.output, re.MULTILINE | re.DOTALL)
    if done.code != 0 or not found:
        return Outcome("failed", why(done))
    return Outcome("ok", "PyTorch's profiler over a run", {"text": found[1]})


def nsys(done: Done) -> Outcome:
    """The summaries that ``nsys stats`` prints; kernels must be among them."""
    start = done.output.find(" ** ")  # the title of the first summary
    text = done.output[start:] if start >= 0 else ""
    if done.code != 0 or "CUDA GPU Kernel Summary" not in text:
        return Outcome("failed", f"no summary of kernels: {why(done)}")
    return Outcome("ok", "Nsight Systems over the timed runs", {"text": text})


def ncu(done: Done) -> Outcome:
    """Nsight Compute's table: a line per launch."""
    lines = done.output.splitlines()
    header = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return Outcome("failed", f"ncu printed no table: {why(done)}")
    table = [line for line in lines[header:] if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(table))))
    found = [
        {"kernel": row.get("Kernel Name", "?")} | {name: row.get(metric) for metric, name in METRICS.items()}
        for row in rows
        if row.get("ID")
    ]
    text = "\n".join("  ".join(f"{key} {value}" for key, value in row.items()) for row in found)
    state = "ok" if done.code == 0 and found else "failed"
    return Outcome(state, f"Nsight Compute, {len(found)} launches", {"text": text, "launches": found})


def resources(done: Done) -> Outcome:
    total = re.findall(r"^\d+ variants, .*$", done.output, re.MULTILINE)
    return Outcome("ok", total[-1]) if done.code == 0 and total else Outcome("failed", (total or [why(done)])[-1])
