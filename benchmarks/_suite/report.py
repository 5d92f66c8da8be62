"""The files of a run, written anew after every step: at most eight, each under 16 MiB, each whole at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _suite.process import shorten

MOST = 15 << 20  # bytes of a file
OURS = ("cuda", "triton", "native")
IMAGES = ("latency", "throughput", "baselines")  # parts
RATES = {"gb_per_s": "GB/s", "gflop_per_s": "GFLOP/s", "tflop_per_s": "TFLOP/s"}

NAMES = ("summary.json", "summary.md", "environment.json", "kernels.json", "logs.txt")
NAMES += ("resources.json", "profile.txt", "tuned.json")  # of the parts that make them

Record = dict[str, Any]


def clear(out: Path) -> None:
    """Makes the folder, and removes an earlier run's files: nothing of theirs shall pass for this one's. OSError."""
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (out / name).unlink(missing_ok=True)
    replace(out / "summary.md", "The suite is running.\n")


def write(out: Path, suite: Record, records: list[Record], logs: dict[str, str]) -> None:
    """``suite``: how it was called, with the environment; ``records``: a step each; ``logs``: their output."""
    results = {record["name"]: record["result"] for record in records if record["result"] is not None}
    kernels = [result for name, result in results.items() if name.startswith("kernels ")]
    texts = {
        "summary.json": dump({**suite, "steps": records}),
        "summary.md": markdown(suite, records),
        "environment.json": dump(suite["environment"]),
        "kernels.json": dump(kernels),
        "logs.txt": "\n".join(f"===== {name}\n{text}" for name, text in logs.items()),
    }
    profiles = [(r["name"], r["result"]["text"]) for r in records if r["part"] == "profile" and r["result"]]
    if profiles:
        texts["profile.txt"] = "\n".join(f"===== {name}\n{text}" for name, text in profiles)
    for name, text in texts.items():
        replace(out / name, shorten(text, MOST // 4))  # a character is at most four bytes


def dump(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def replace(path: Path, text: str) -> None:
    """An interruption leaves the old file whole. Only the standard library: the suite runs where nothing else does."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def markdown(suite: Record, records: list[Record]) -> str:
    """The summary for people."""
    environment = suite["environment"] or {}
    gpu, versions = environment.get("gpu"), environment.get("versions") or {}
    title = f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}" if gpu else f"no GPU: {environment.get('no_gpu')}"
    lines = [f"# {title}", "", f"{environment.get('date')}, commit {environment.get('commit')}", ""]
    lines += [f"{environment.get('cpu')}, {environment.get('cores')} cores; {environment.get('platform')}", ""]
    lines += [", ".join(f"{name} {found}" for name, found in versions.items() if found), ""]
    if suite["stopped"]:
        lines += [f"**Stopped early: {suite['stopped']}.**", ""]
    rows = [(r["name"], r["status"], f"{r['seconds']:.1f}", r["reason"].replace("|", "/")) for r in records]
    lines += ["## Steps", "", *grid(("step", "status", "seconds", ""), rows), ""]
    by_name = {record["name"]: record["result"] for record in records if record["result"]}
    ceilings = by_name.get("ceilings")
    if ceilings:
        lines += ["## Ceilings, measured in this run", "", *grid(("", "median"), ceiling_rows(ceilings)), ""]
    kernels = {n.removeprefix("kernels "): found for n, found in by_name.items() if n.startswith("kernels ")}
    timed = [kernel_row(name, found, ceilings) for name, found in kernels.items() if "results" in found]
    if timed:
        header = ("op", "ours", "ms", "best other", "ms", "times", "rate of ours")
        lines += ["## Kernels, medians", "", *grid(header, timed), ""]
    calls = by_name.get("overhead")
    if calls:
        levels = list(next(iter(calls["results"].values())))
        rows = [(op, *(f"{times[level]:.1f}" for level in levels)) for op, times in calls["results"].items()]
        lines += ["## Microseconds of a call", "", *grid(("op", *levels), rows), ""]
    runs = [row for r in records if r["part"] in IMAGES for row in generation_rows(r["result"])]
    if runs:
        lines += ["## Images", "", *grid(("benchmark", "row", "a batch", "images/s", "first batch"), runs), ""]
    if by_name.get("precision"):
        header = ("row", "ids by step, mean", "in a free run", "residual, relative", "PSNR of the free run")
        lines += ["## Precision", "", *grid(header, precision_rows(by_name["precision"])), ""]
    failures = [f for name in ("graphs", "tests") for f in (by_name.get(name) or {}).get("failures", [])]
    if failures:
        lines += ["## Tests that failed", "", *(f"- `{f['test']}`: {f['message']}" for f in failures), ""]
    return "\n".join(lines)


def grid(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table in Markdown."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def ceiling_rows(ceilings: Record) -> list[tuple[str, str]]:
    found = [("copy, read + written", ceilings["copy_gb_per_s"], "GB/s")]
    found += [(f"{name} product", rate, "TFLOP/s") for name, rate in ceilings["matmul_tflop_per_s"].items()]
    return [(name, f"{rate['median']:.4g} {unit}" if rate else "-") for name, rate, unit in found]


def kernel_row(name: str, found: Record, ceilings: Record | None) -> tuple[str, ...]:
    """Our fastest backend beside the fastest of the rest, and how close it is to the ceilings."""
    medians = {implementation: times["median_ms"] for implementation, times in found["results"].items()}
    ours = min((n for n in medians if n in OURS), key=medians.__getitem__, default=None)
    other = min((n for n in medians if n not in OURS), key=medians.__getitem__, default=None)
    cells = [(n or "-", f"{medians[n]:.4g}" if n else "-") for n in (ours, other)]
    times = f"{medians[other] / medians[ours]:.2f}" if ours and other else "-"
    return (name, *cells[0], *cells[1], times, rate(found, ours or other, ceilings))


def rate(found: Record, implementation: str | None, ceilings: Record | None) -> str:
    """What the benchmark reports under "gb_per_s", "gflop_per_s" or "tflop_per_s", with its share of the ceiling."""
    texts = []
    for key, unit in RATES.items():
        value = found.get(key)
        value = value.get(implementation) if isinstance(value, dict) else value
        if isinstance(value, (int, float)):
            share = share_of_ceiling(key, value, found, ceilings)
            texts.append(f"{value:.4g} {unit}" + (f", {share:.0%} of the ceiling" if share else ""))
    return "; ".join(texts) or "-"


def share_of_ceiling(key: str, value: float, found: Record, ceilings: Record | None) -> float | None:
    """Of the copy, or of the product in the benchmark's dtype, bfloat16 where it names none."""
    if not ceilings:
        return None
    if key == "gb_per_s":
        ceiling = ceilings["copy_gb_per_s"]
        return value / ceiling["median"] if ceiling else None
    dtype = str(found.get("dtype") or "bfloat16").removeprefix("torch.")
    ceiling = ceilings["matmul_tflop_per_s"].get(dtype)
    tflops = value / 1e3 if key == "gflop_per_s" else value
    return tflops / ceiling["median"] if ceiling else None


def generation_rows(found: Record | None) -> list[tuple[str, ...]]:
    if not found:
        return []
    what = f"{found['benchmark']}, {found['preset']}, batch {found['batch']}"
    rows = []
    for row in found["rows"]:
        if row["median_s"]:
            first = row.get("first_s")
            cells = f"{1e3 * row['median_s']:.4g} ms", f"{row['images_per_s']:.3g}", f"{first:.3g} s" if first else "-"
            rows.append((what, row["name"], *cells))
        else:
            rows.append((what, row["name"], f"unavailable: {row.get('unavailable')}".replace("|", "/"), "-", "-"))
    return rows


def precision_rows(found: Record) -> list[tuple[str, ...]]:
    """What precision.py found."""
    rows = []
    for row in found["rows"]:
        steps, quality = row["step_agreement"], row["psnr_free"]
        shares = f"{sum(steps) / len(steps):.2%}", f"{row['free_agreement']:.2%}", f"{row['residual']['relative']:.2e}"
        name = row["name"] + (" (emulated)" if row["emulated"] else "")
        rows.append((name, *shares, "equal" if quality is None else f"{quality:.1f} dB"))
    return rows
