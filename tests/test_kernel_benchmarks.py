"""The benchmarks of single ops run, gate on parity and end with their JSON line. Small sizes: no time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {"vq_lookup": ["--rows", "70", "--codes", "600", "--channels", "9", "--rounds", "2", "--no-compile"]}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_benchmark_is_here() -> None:
    folder = ROOT / "benchmarks" / "kernels"
    assert {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_runs(name: str) -> None:
    done = run(name, *SMALL[name])
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == name and line["versions"]["torch"] and line["hardware"]
    assert {"reference", line["fastest_torch"]} <= set(line["results"])
    for times in line["results"].values():
        assert 0 < times["min_ms"] <= times["p20_ms"] <= times["median_ms"] <= times["p80_ms"]


def test_wrong_results_are_not_timed() -> None:
    """The gate itself, with an implementation that is off by one code."""
    code = """
import sys
sys.path.insert(0, "benchmarks/kernels")
import torch, vq_lookup as benchmark
z, codebook = torch.randn(20, 5), torch.randn(30, 5)
def wrong(z, codebook):
    ids, codes, residual = benchmark.by_cdist(z, codebook)
    return (ids + 1) % 30, codes, residual
benchmark.check_parity({"right": benchmark.by_cdist, "wrong": wrong}, z, codebook)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "error: wrong is wrong, nothing was timed" in done.stderr
    assert "parity right" in done.stdout


def test_bad_arguments() -> None:
    done = run("vq_lookup", "--rows", "0")
    assert done.returncode == 2 and "--rows must be at least 1, got 0" in done.stderr
