"""The README's table of results, made from files that are made up; and that the README's own is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmark_scripts import import_module  # noqa: F401  (a fixture)

ROW = {"name": "fast-bfloat16", "dtype": "bfloat16", "median_s": 0.025, "p20_s": 0.024, "p80_s": 0.027}
ROW |= {"images_per_s": 40.0, "peak_bytes": 3 << 30, "first_s": 12.5, "stages": {}}
BASE = ROW | {"name": "eager-float32", "dtype": "float32", "median_s": 0.25, "images_per_s": 4.0, "first_s": None}
RESULT = {"benchmark": "latency", "preset": "dc-ar-512", "batch": 1, "height": 512, "width": 512, "steps": 12}
RESULT |= {"device": "NVIDIA H100", "versions": {"torch": "2.11", "driver": "580", "dcar_fast": "0.1"}}
RESULT |= {"commit": "0123456789abcdef-dirty", "time": "2026-01-02T03:04:05+00:00", "rows": [BASE, ROW]}
CPU = RESULT | {"device": "AMD EPYC, 2 threads", "versions": {"torch": "2.13", "driver": None}, "preset": "shapes"}


@pytest.fixture
def tool(module, tmp_path: Path, capsys):
    """(status, table) of the tool over files that are given as {name: content}."""
    readme = tmp_path / "README.md"
    readme.write_text("# A\n\n<!-- results: begin -->\nold\n<!-- results: end -->\n\nthe rest\n")
    results = tmp_path / "results"
    results.mkdir()

    def call(files: dict[str, object], *options: str) -> tuple[int, str]:
        for name, content in files.items():
            (results / name).parent.mkdir(exist_ok=True)
            (results / name).write_text(content if isinstance(content, str) else json.dumps(content))
        status = module("results_table").main(["--results", str(results), "--readme", str(readme), *options])
        text = readme.read_text()
        assert text.startswith("# A\n\n<!-- results: begin -->\n")
        assert text.endswith("\n<!-- results: end -->\n\nthe rest\n")
        return status, text

    return call


def test_the_readme_is_up_to_date(module) -> None:
    assert module("results_table").main(["--check"]) == 0, "run python benchmarks/results_table.py"


def test_a_table(tool) -> None:
    status, text = tool({"a.json": CPU, "kernels.json": [{"op": "x"}], "b.json": RESULT | {"command": "python x"}})
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert status == 0 and lines[0] == list(("benchmark", "row", "a batch", "p20 - p80", "images/s", "speed")) + list(
        ("first", "peak memory", "run")
    )
    what = "latency, dc-ar-512, 512 x 512 px, batch 1"
    assert lines[1] == [what, "eager-float32", "250 ms", "24 ms - 27 ms", "4", "1.00x", "-", "3,072 MiB", "1"]
    assert lines[2][1:] == ["fast-bfloat16", "25 ms", "24 ms - 27 ms", "40", "10.00x", "12.5 s", "3,072 MiB", "1"]
    assert lines[3][0].startswith("latency, shapes") and lines[3][-1] == "2"  # GPUs come first
    assert "1. `python x`, 12 steps, on NVIDIA H100; torch 2.11, driver 580; commit 0123456789ab with" in text
    assert "2. `OMP_NUM_THREADS=2 python benchmarks/latency.py --preset shapes --bs 1`, 12 steps, on AMD EPYC" in text


def test_newer_results_replace_older_ones_of_the_same_work(tool) -> None:
    later = {"time": "2026-02-02T03:04:05+00:00", "commit": "f" * 40}
    newer, other = CPU | later | {"rows": [ROW]}, CPU | {"batch": 2}
    status, text = tool({"z-older.json": CPU, "a-newer.json": newer, "other.json": other})
    assert status == 0 and text.count("| latency, shapes, 512 x 512 px, batch 1 |") == 1
    assert text.count("| latency, shapes, 512 x 512 px, batch 2 |") == 2
    assert "commit ffffffffffff, 2026-02-02" in text
    (line,) = (line for line in text.splitlines() if "batch 1 |" in line)
    assert " | - | 12.5 s" in line  # no reference in this run: no speed, least of all against the older one


def test_a_run_of_the_suite(tool) -> None:
    """All its runs of one size are shown: the compiled baseline comes from a command of its own."""
    compiled = ROW | {"name": "compile-bfloat16:max-autotune", "median_s": 0.05}
    failed = {"name": "compile-x", "dtype": "x", "stages": {}, "unavailable": "no compiler"} | dict.fromkeys(
        ("median_s", "p20_s", "p80_s", "images_per_s", "peak_bytes")
    )
    second = RESULT | {"rows": [ROW, compiled, failed], "time": "2026-01-02T04:00:00+00:00"}
    steps = [{"name": "ceilings", "result": {"benchmark": "ceilings"}}, {"name": "tests", "result": None}]
    steps += [{"name": "latency", "result": RESULT}, {"name": "baselines latency", "result": second}]
    status, text = tool({"h100/summary.json": {"steps": steps}, "h100/environment.json": {"name": "h100"}})
    assert status == 0 and text.count("| latency, dc-ar-512") == 4 and "compile-bfloat16:max-autotune | 50 ms" in text
    assert "2026-01-02. compile-x could not run: no compiler." in text


def test_check(tool, capsys) -> None:
    assert tool({"a.json": CPU}, "--check")[0] == 1
    assert "are stale: run python benchmarks/results_table.py" in capsys.readouterr().err
    assert tool({})[0] == 0 and tool({}, "--check")[0] == 0
    assert tool({"b.json": RESULT}, "--check")[0] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"benchmark": ', "is no JSON"),
        (RESULT | {"rows": [{"name": "x"}]}, "is no benchmark result: rows[0] lacks"),
        ({k: v for k, v in RESULT.items() if k != "commit"}, "is no benchmark result: 'commit' is missing"),
    ],
)
def test_broken_files_are_named(tool, capsys, content, message) -> None:
    status, text = tool({"bad.json": content})
    error = capsys.readouterr().err
    assert status == 1 and "\nold\n" in text
    assert error.startswith("results_table.py: error: ") and "bad.json" in error and message in error


def test_a_readme_without_markers(module, tmp_path, capsys) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    assert module("results_table").main(["--results", str(tmp_path), "--readme", str(readme)]) == 1
    assert "has no <!-- results: begin -->" in capsys.readouterr().err
