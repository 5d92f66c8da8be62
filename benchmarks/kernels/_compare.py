"""What the benchmarks of single ops share: interleaved timing, the table and the JSON line.

Import this module before dcar_fast: it makes the checkout's package importable where none is installed.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _report import commit, environment, percentile, table  # noqa: E402  (its folder is not a package)


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds per call. Every round calls each candidate once, starting with another one each time, so that a busy
    neighbour slows them alike; rounds before are not counted. On a GPU the time between two events, its cache emptied
    before: see ``event_timer``."""
    if device != "cpu":
        import torch

        from dcar_fast.timing import event_timer

        return event_timer(torch.device(device), rounds)(candidates)
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            candidates[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Milliseconds per candidate: minimum, p20, median, p80."""
    shares = {"min": 0.0, "p20": 0.2, "median": 0.5, "p80": 0.8}
    return {
        name: {f"{key}_ms": 1e3 * percentile(values, share) for key, share in shares.items()}
        for name, values in seconds.items()
    }


def print_results(
    benchmark: str, device: str, arguments: Mapping[str, Any], results: dict[str, dict[str, float]], **more: Any
) -> None:
    """The table, and one JSON line last with versions, hardware and commit."""
    import torch

    ranking = sorted(results, key=lambda name: results[name]["median_ms"])
    fastest = results[ranking[0]]["median_ms"]
    lines = [
        (name, *(f"{value:.3f}" for value in results[name].values()), f"{results[name]['median_ms'] / fastest:.2f}")
        for name in ranking
    ]
    print(table(("implementation", "min ms", "p20", "median", "p80", "times the fastest"), lines))
    hardware = torch.cuda.get_device_name(device) if device != "cpu" else _cpu_name()
    line = {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        **arguments,
        "results": results,
        **more,
        "versions": environment(device),
        "commit": commit(),
    }
    print(json.dumps(line))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [row for row in info.read_text().splitlines() if row.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
