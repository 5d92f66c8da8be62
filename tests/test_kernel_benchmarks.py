"""The benchmarks of single ops run, gate on parity and end with their JSON line. Small sizes: no time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ATTENTION = "--batch 2 --heads 2 --head-size 5 --rounds 2 --dtype float32 --no-compile"
IMAGES = "--batch 3 --side 5 --rounds 2 --no-compile"
SMALL = {
    "add_residual": "--batch 2 --tokens 9 --channels 5 --codes 30 --rounds 2 --no-compile",
    "bias_residual": f"{IMAGES} --channels 33",
    "channel_norm": f"{IMAGES} --channels 33",
    "cross_attention": f"{ATTENTION} --queries 7 --keys 9",
    "denoise_step": "--rows 6 --width 40 --depth 1 --channels 3 --rounds 2 --no-compile",
    "depthwise_gate": f"{IMAGES} --channels 5",
    "embed_tokens": "--batch 2 --tokens 9 --width 70 --codes 30 --rounds 2 --no-compile",
    "fused_linear": "--layer fc1 --rows 9 --width 70 --hidden 90 --rounds 2 --dtype float32 --no-compile",
    "gelu": "--rows 5 --width 37 --rounds 2 --no-compile",
    "latent_noise": "--rows 7 --channels 6 --rounds 2 --no-compile",
    "place_tokens": "--batch 3 --tokens 10 --rounds 2 --no-compile",
    "quantize_rows": "--layer fc1 --rows 9 --width 70 --hidden 90 --rounds 2 --no-compile",
    "relu_linear_attention": f"{IMAGES} --channels 64",
    "remask": "--rows 3 --tokens 10 --rounds 2 --no-compile",
    "sample_from_logits": "--rows 5 --codes 60 --rounds 2 --no-compile",
    "sample_tokens": "--rows 5 --width 12 --codes 60 --rounds 2 --no-compile",
    "self_attention": f"{ATTENTION} --tokens 9",
    "upsample_shortcut": f"{IMAGES} --channels 6 --inputs 8",
    "vq_lookup": "--rows 70 --codes 600 --channels 9 --rounds 2 --no-compile",
}
NO_OPS = {"cpu", "overhead", "resources"}  # in tests of their own


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_benchmark_is_here() -> None:
    folder = ROOT / "benchmarks" / "kernels"
    assert {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} == set(SMALL) | NO_OPS


@pytest.mark.parametrize("name", SMALL)
def test_runs(name: str) -> None:
    done = run(name, *SMALL[name].split())
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


@pytest.mark.parametrize("name", ["cross_attention", "self_attention", "vq_lookup"])
def test_training_steps(name: str) -> None:
    done = run(name, *SMALL[name].split(), "--train")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["train"] is True and {"reference", line["fastest_torch"]} <= set(line["results"])


def test_overhead() -> None:
    done = run("overhead", "--calls", "3", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert set(line["results"]) == {"add_residual", "remask", "sample_from_logits", "vq_lookup"}
    for microseconds in line["results"].values():
        assert microseconds["public_us"] > 0 and microseconds["bare_us"] > 0
    assert set(line["registration"]) == {"plain_us", "define_us", "custom_op_us"}
    done = run("overhead", "--calls", "0")
    assert done.returncode == 2 and "--calls must be at least 1, got 0" in done.stderr


def test_cpu_benchmarks_collect_and_run() -> None:
    """Every CPU op on every backend that runs here, once and untimed."""
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    file = ROOT / "benchmarks" / "kernels" / "cpu.py"
    command = [sys.executable, "-m", "pytest", "-q", str(file), "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "-o", "addopts="], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout and "failed" not in done.stdout
