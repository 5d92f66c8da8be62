"""benchmarks/integrations.py: it compares before it times, and writes what it saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmark_scripts import run


def test_a_small_run(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    work = ("--heads", "dcar", "--rows", 2, "--steps", "3", "--repeats", 2, "--device", "cpu", "--guided")
    done = run("integrations.py", *work, "--json", file)
    assert done.returncode == 0, done.stderr
    line = json.loads(file.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == line
    (result,) = line["results"]
    assert (result["head"], result["rows"], result["steps"], result["guidance"]) == ("dcar", 2, 3, 4.5)
    assert 0 < result["error"] < 1e-3 and len(result["seconds"]["patched"]) == 2
    assert result["ratio"] == pytest.approx(result["median_s"]["original"] / result["median_s"]["patched"])
    assert "6 blocks x 1024" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--rows", 0), "--repeats and --rows must be at least 1"),
        (("--rows", 3, "--guided"), "--rows must be even with --guided"),
        (("--heads", "vit"), "invalid choice: 'vit'"),
    ],
)
def test_bad_arguments(wrong: tuple, message: str) -> None:
    done = run("integrations.py", *wrong)
    assert done.returncode == 2 and message in done.stderr
