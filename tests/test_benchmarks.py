"""The benchmark scripts as their users run them, on the small preset with as few runs as there can be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.benchmark_scripts import BENCHMARKS, import_module, run  # noqa: F401  (a fixture)

QUICK = ("--device", "cpu", "--preset", "shapes", "--warmup", "0", "--repeats", "2", "--steps", "2")
KEYS = {"benchmark", "preset", "batch", "height", "width", "steps", "device", "rows", "versions", "commit", "time"}
KEYS |= {"command", "threads"}
ROW_KEYS = {"name", "dtype", "median_s", "p20_s", "p80_s", "images_per_s", "peak_bytes", "first_s", "first", "stages"}
ROW_KEYS |= {"remarks"}


def last_json(output: str) -> dict:
    return json.loads(output.splitlines()[-1])


def check_row(row: dict, name: str, dtype: str, batch: int) -> None:
    assert set(row) == ROW_KEYS
    assert (row["name"], row["dtype"]) == (name, dtype)
    assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
    assert row["images_per_s"] == pytest.approx(batch / row["median_s"])
    assert 50 * 2**20 < row["peak_bytes"] < 8 * 2**30
    assert set(row["stages"]) == {"text", "unmask", "head", "decode"}
    assert all(seconds > 0 for seconds in row["stages"].values())
    assert set(row["first"]) == {"import_s", "build_s", "image_s"} and min(row["first"].values()) > 0
    assert row["first_s"] == pytest.approx(sum(row["first"].values())) and row["remarks"] == []


@pytest.fixture(scope="module")
def latency(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """Where there is no compiler for torch.compile."""
    folder = tmp_path_factory.mktemp("latency")
    environment = {"CXX": str(folder / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    rows = ("eager-float32", "fast-float32", "compile-float32")
    done = run("latency.py", *QUICK, "--rows", *rows, "--json", folder / "result.json", **environment)
    assert done.returncode == 0, done.stderr
    return done, folder / "result.json"


def test_latency(latency):
    done, file = latency
    result = last_json(done.stdout)
    assert set(result) == KEYS
    assert json.loads(file.read_text()) == result
    wanted = {"benchmark": "latency", "preset": "shapes", "batch": 1, "height": 64, "width": 64, "steps": 2}
    assert {key: result[key] for key in wanted} == wanted
    assert result["versions"]["torch"] == torch.__version__
    assert result["threads"] == 1 and result["command"].startswith("python benchmarks/latency.py --device cpu --preset")
    for row, (kind, dtype) in zip(result["rows"], (("eager", "float32"), ("fast", "float32")), strict=False):
        check_row(row, f"{kind}-{dtype}", dtype, 1)
    (parity,) = (
        line for line in done.stdout.splitlines() if line.strip().startswith("fast-float32  ") and "ids" in line
    )
    assert parity.endswith(": ok")


def test_compile_without_a_compiler_is_unavailable(latency):
    done, _ = latency
    compiled = last_json(done.stdout)["rows"][2]
    assert set(compiled) == ROW_KEYS | {"unavailable"}
    assert compiled["name"] == "compile-float32" and compiled["median_s"] is None
    assert "ompiler" in compiled["unavailable"]
    assert f"compile-float32 is unavailable: {compiled['unavailable']}" in done.stdout


def test_percentiles_are_numpys(module):
    values = [3.0, 1.0, 7.0, 2.0, 2.5]
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        wanted = torch.quantile(torch.tensor(values, dtype=torch.float64), share).item()
        assert module("_report").percentile(values, share) == pytest.approx(wanted)
    assert module("_report").percentile([4.0], 0.8) == 4.0


# ---- compare.py


def changed(result: dict, **changes) -> str:
    return json.dumps(result | changes)


def test_compare(latency, tmp_path):
    done, file = latency
    result = last_json(done.stdout)
    twice = json.loads(json.dumps(result))
    for key in ("median_s", "p20_s", "p80_s"):
        twice["rows"][0][key] /= 2
    twice["rows"][0]["stages"]["head"] /= 4
    del twice["rows"][1]
    new = tmp_path / "new.txt"
    new.write_text(f"some table\n\n{json.dumps(twice)}\n")
    compared = run("compare.py", file, new)
    assert compared.returncode == 0, compared.stderr
    lines = {line.split("  ")[0]: line for line in compared.stdout.splitlines()}
    assert "2.00x" in lines["eager-float32"]
    assert "4.00x" in lines["eager-float32 head"] and "1.00x" in lines["eager-float32 text"]
    assert "fast-float32: not in NEW" in compared.stdout
    assert "compile-float32: unavailable in OLD" in compared.stdout
    same = run("compare.py", file, file)
    assert "1.00x  ~" in same.stdout and "overlap" in same.stdout


def test_compare_refuses_other_work(latency, tmp_path):
    _, file = latency
    other = tmp_path / "other.json"
    other.write_text(changed(json.loads(file.read_text()), batch=16, preset="dc-ar-512", device="H200"))
    refused = run("compare.py", file, other)
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert "preset 'shapes' and 'dc-ar-512'; batch 1 and 16; device" in refused.stderr
    forced = run("compare.py", file, other, "--force")
    assert forced.returncode == 0
    assert "WARNING: they differ in batch 1 and 16" in forced.stdout and "1.00x" in forced.stdout


BROKEN = {
    "empty": ("", "is empty"),
    "cut": ('{"benchmark": "latency", "rows": [{"na', "its last line is no JSON"),
    "list": ("[1, 2]", "holds a list"),
    "foreign": ('{"a": 1}', "is no benchmark result: 'benchmark' is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_compare_names_what_is_broken(latency, tmp_path, name):
    text, message = BROKEN[name]
    broken = tmp_path / "broken.json"
    broken.write_text(text)
    done = run("compare.py", latency[1], broken)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"compare.py: error: {broken}") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_compare_names_broken_rows_and_missing_files(latency, tmp_path):
    result = json.loads(latency[1].read_text())
    broken = tmp_path / "broken.json"
    row = result["rows"][0]
    cases = [
        ([{k: v for k, v in row.items() if k != "p20_s"}], "rows[0] lacks p20_s"),
        ([row, row | {"median_s": None}], "rows[1] has values that are no numbers"),
        ([row | {"median_s": 0}], "rows[0] has a median of 0"),
        ([row, row], "named twice"),
        (["row"], "rows[0] is no object"),
    ]
    for rows, message in cases:
        broken.write_text(changed(result, rows=rows))
        done = run("compare.py", broken, latency[1])
        assert done.returncode == 1 and message in done.stderr, done.stderr
    done = run("compare.py", tmp_path / "missing.json", latency[1])
    assert done.returncode == 1 and "missing.json cannot be read: No such file" in done.stderr


def test_graphs_count_what_they_work_in(module) -> None:
    def segment(total: int, allocated: int, **pool: object) -> dict[str, object]:
        return {"total_size": total, "allocated_size": allocated, **pool}

    ours, torchs = segment(100, 30, segment_pool_id=(0, 7)), segment(1000, 10, segment_pool_id=(0, 0))
    graph_memory = module("_session").graph_memory
    assert graph_memory([ours, torchs, segment(5000, 1)]) == 70 and graph_memory([]) == 0


@pytest.mark.parametrize(
    ("kind", "unavailable", "broken"),
    [
        ("fast", None, False),
        ("fast", "IndexError: index 3 is out of bounds", True),
        ("fast", "RuntimeError: CUDA error: misaligned address", True),
        ("fast", "its process ended with exit code -11", True),
        ("fast", "ValueError: fp8 needs a GPU of compute capability 8.9 or newer, this is cpu", False),
        ("fast", "OutOfMemoryError: no memory to capture it", False),
        ("fast", "its process ended with exit code -9 (killed; most likely out of memory)", False),
        ("compile", "RuntimeError: no C++ compiler", False),
    ],
)
def test_a_fast_row_that_breaks_is_no_success(module, kind: str, unavailable: str | None, broken: bool) -> None:
    """A baseline may be missing; the fast sampler may only be refused, or lack memory."""
    row = SimpleNamespace(spec=SimpleNamespace(kind=kind), unavailable=unavailable)
    assert module("_harness").is_broken(row) == broken
