"""What the benchmarks print: tables, durations, versions, the commit.

Import this module before dcar_fast: it makes the checkout's package importable where none is installed.
"""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("dcar_fast") is None:
    sys.path.append(str(ROOT))

STAGES = ("text", "unmask", "head", "decode")


class Failure(Exception):
    """Ends the benchmark with one line and exit code 1."""


def note(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values, numpy's default."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    text = []
    for line in (header, *lines):
        first, *others = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def duration(seconds: float | None) -> str:
    """Milliseconds below ten seconds."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.4g} ms" if seconds < 10 else f"{seconds:.4g} s"


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


def print_tables(results: list[dict[str, Any]], settings: Any) -> None:
    """The rows and their stages; ``settings`` is an ``_arguments.Settings``."""
    from dcar_fast import flops
    from dcar_fast.config import SamplingConfig

    work = settings.work
    sampling = SamplingConfig(num_steps=work.steps)
    stages = flops.generation(
        settings.config, sampling, batch=work.batch, grid=settings.grid, prompt_tokens=work.prompt_tokens
    )
    total = sum(flops.flops(ops) for ops in stages.values())
    base = next((r["median_s"] for r in results if r["median_s"]), None)
    lines = []
    for r in results:
        if "unavailable" in r:
            lines.append([r["name"], "unavailable", *[""] * 7])
            continue
        lines.append(
            [
                r["name"],
                duration(r["median_s"]),
                duration(r["p20_s"]),
                duration(r["p80_s"]),
                f"{r['images_per_s']:.4g}",
                f"{base / r['median_s']:.2f}x",
                f"{total / r['median_s'] / 1e12:.3g}",
                mebibytes(r["peak_bytes"]),
                duration(r["first_s"]),
            ]
        )
    print()
    print(table(["row", "median", "p20", "p80", "images/s", "speed", "TFLOP/s", "peak memory", "first"], lines))
    print_stages(results, work.steps)
    for r in results:
        for remark in r["remarks"]:
            print(f"{r['name']} remarks: {remark}")
    memory = (
        "peak memory: torch.cuda.max_memory_allocated of each row's own process during the timed runs, and"
        " what its CUDA graphs work in"
        if work.device != "cpu"
        else "peak memory: largest resident set of each row's own process during the timed runs, libraries included"
    )
    print("\ntotal: from prompts to pixels on the device without a stop in between; stages: separate runs with stops")
    print(memory)
    print("first: from the start of a process to the end of its first batch: imports, weights from disk, compilation")
    print(f"work: {total / 1e12:.4g} TFLOP per batch by the reference's arithmetic; speed: relative to the first row")


def print_stages(results: list[dict[str, Any]], steps: int) -> None:
    """The table of the stages, and why rows are missing."""
    header = ["stage", "text", f"unmask x{steps}", "head", "decode", "sum", "total"]
    lines = []
    for r in results:
        if "unavailable" in r:
            print(f"{r['name']} is unavailable: {r['unavailable']}")
            continue
        if not r["stages"]:
            continue
        times = [r["stages"][s] for s in STAGES]
        lines.append([r["name"], *map(duration, times), duration(sum(times)), duration(r["median_s"])])
    if lines:
        print()
        print(table(header, lines))


def environment(device: str) -> dict[str, str | None]:
    """Versions of what was run; None for what is missing."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    from dcar_fast import __version__

    versions["dcar_fast"] = __version__
    versions["cuda"] = torch.version.cuda
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = _output(query) if device != "cpu" else None
    versions["driver"] = driver.splitlines()[0].strip() if driver else None
    return versions


def threads(device: str) -> int | None:
    """The threads that torch uses on a CPU."""
    import torch

    return torch.get_num_threads() if device == "cpu" else None


def commit() -> str | None:
    """The commit of the package that was run, "-dirty" if tracked files differ from it; None outside git."""
    import dcar_fast

    folder = str(Path(dcar_fast.__file__).resolve().parent.parent)
    revision = _output(["git", "-C", folder, "rev-parse", "HEAD"])
    if not revision:
        return None
    changed = _output(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"])
    return revision.strip() + ("-dirty" if changed else "")


def _output(command: list[str]) -> str | None:
    """A command's output, None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
