"""The table of registers, spills and shared memory: its rows, what is a defect, and the page it is written to."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler by the interpreter", allow_module_level=True)

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "benchmarks" / "kernels"
KEYS = {"kernel", "target", "dtype", "shape", "config", "registers", "spills", "shared_bytes", "mma"}


@pytest.fixture
def resources(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(KERNELS))
    return importlib.import_module("resources")


def row(**changes) -> dict:
    good = {"kernel": "op.part", "target": "sm_90", "dtype": "bf16", "shape": "C=32", "config": "64x64 w4 s2"}
    good |= {"backend": "triton", "shipped": True, "tensor_cores": False, "shared_limit": 232448}
    return good | {"registers": 168, "spills": 0, "stack_bytes": 0, "shared_bytes": 4096, "mma": {}} | changes


def test_real_kernels(tmp_path: Path) -> None:
    """One small kernel for one GPU, as the command is called."""
    command = [sys.executable, str(KERNELS / "resources.py"), "--targets", "80", "--match", "add_residual bf16"]
    done = subprocess.run([*command, "--json", str(tmp_path / "r.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())
    assert rows and all(KEYS <= set(row) for row in rows)
    for found in rows:
        assert (found["kernel"], found["target"], found["dtype"]) == ("add_residual", "sm_80", "bf16")
        assert 0 < found["registers"] <= 255 and found["spills"] == 0 and found["shared_bytes"] > 0
        assert f"{found['registers']:>11}{found['spills']:>8}{found['shared_bytes']:>8}" in done.stdout
    assert f"{len(rows)} variants, 0 of what ships with defects" in done.stdout


def test_nothing_matched_is_an_error() -> None:
    command = [sys.executable, str(KERNELS / "resources.py"), "--targets", "80", "--match", "no such kernel"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "0 variants" in done.stdout


DEFECTS = [
    ({}, []),
    ({"spills": 3}, ["spills (3 instructions, 0 bytes of stack)"]),
    ({"stack_bytes": 8}, ["spills (0 instructions, 8 bytes of stack)"]),
    ({"shared_bytes": 232449}, ["needs 232449 bytes of shared memory, a block can have 232448"]),
    ({"tensor_cores": True}, ["has no matrix instructions"]),
    ({"tensor_cores": True, "mma": {"HGMMA": 4}}, []),
    ({"error": "PTXASError: too much"}, ["does not compile: PTXASError: too much"]),
]


@pytest.mark.parametrize(("changes", "wanted"), DEFECTS)
def test_defects(resources, changes: dict, wanted: list[str]) -> None:
    assert resources.defects(row(**changes)) == wanted


def test_limits_of_rows_that_bring_none(resources) -> None:
    """nvcc's rows: the limit is the target's."""
    native = {key: value for key, value in row(target="sm_90a", shared_bytes=232449).items() if key != "shared_limit"}
    assert resources.defects(native) == ["needs 232449 bytes of shared memory, a block can have 232448"]
    assert resources.defects(native | {"target": "sm_89", "shared_bytes": 101376}) == []


@pytest.mark.parametrize(("shipped", "status"), [(True, 1), (False, 0)])
def test_what_ships_must_be_sound(resources, monkeypatch, capsys, tmp_path, shipped: bool, status: int) -> None:
    rows = [row(), row(spills=2, shipped=shipped), row(shipped=shipped, error="PTXASError: x", registers=None)]
    monkeypatch.setattr(resources, "triton_rows", lambda targets, every, match: iter(rows))
    monkeypatch.setattr(resources, "native_rows", lambda targets, match: ([], "nvcc is missing"))
    monkeypatch.setattr(sys, "argv", ["resources.py", "--all", "--json", str(tmp_path / "r.json")])
    assert resources.main() == status
    captured = capsys.readouterr()
    counts = "2 of what ships with defects, 0 candidates" if shipped else "0 of what ships with defects, 2 candidates"
    assert counts in captured.out and "not in the table: csrc: nvcc is missing" in captured.out
    assert captured.err.count("defect: sm_90 op.part bf16 C=32 64x64 w4 s2: ") == (2 if shipped else 0)
    assert json.loads((tmp_path / "r.json").read_text()) == rows


def test_native_rows(resources, monkeypatch) -> None:
    known = {"kernel": "remask_kernel<int, short>", "registers": 30, "spills": 0, "shared_bytes": 48, "mma": {}}
    rows = [known | {"target": target, "stack": 8} for target in ("sm_80", "sm_90a", "sm_100")]
    monkeypatch.setitem(sys.modules, "_native_resources", SimpleNamespace(native_rows=lambda: rows))
    found, missing = resources.native_rows([90, 100], "remask")
    assert missing is None and [r["target"] for r in found] == ["sm_90a", "sm_100"]
    assert all(KEYS <= set(r) for r in found) and resources.label(found[0]) == "remask_kernel int, short any"
    assert resources.defects(found[0]) == ["spills (0 instructions, 8 bytes of stack)"]
    assert resources.native_rows([90], "vq")[0] == []

    def fails():
        raise RuntimeError("nvcc is not on PATH")

    monkeypatch.setitem(sys.modules, "_native_resources", SimpleNamespace(native_rows=fails))
    assert resources.native_rows([90], "") == ([], "nvcc is not on PATH")


def test_candidates_are_told_from_what_ships(resources, monkeypatch) -> None:
    """Everything goes through the pool's function; one candidate does not compile, and its row says so."""
    from dcar_fast.kernels import offline

    monkeypatch.setattr(offline, "kernel_names", lambda: ["add_residual"])
    calls = []

    def compile_variant(variant, target):
        calls.append(target)
        if len(calls) == 2:
            raise ValueError("ptxas died\nmore")
        return offline.Resources(40, 0, 2048, 0, {"HMMA": 8})

    class Pool:
        def __init__(self, *arguments) -> None: ...
        def __enter__(self):
            return self

        def __exit__(self, *error) -> None: ...
        def map(self, function, jobs):
            return map(function, jobs)

    monkeypatch.setattr(resources, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(offline, "compile_variant", compile_variant)
    rows = list(resources.triton_rows([120], True, "add_residual fp32 C=32 "))
    shipped = [found for found in rows if found["shipped"]]
    labels = {variant.label for variant in offline.variants(120, False, ["add_residual"])}
    assert 0 < len(shipped) < len(rows) and {resources.label(found) for found in shipped} <= labels
    assert rows[1]["error"] == "ValueError: ptxas died" and rows[1]["registers"] is None
    assert rows[0]["mma"] == {"HMMA": 8} and rows[0]["target"] == "sm_120" and set(calls) == {120}


PAGE = "before\n<!-- resources: begin -->\nold\n<!-- resources: end -->\nafter\n"


def test_the_page(resources, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for _ in range(2):
        resources.insert(page, "| new |")
        assert page.read_text() == PAGE.replace("old", "| new |")


@pytest.mark.parametrize("text", ["", "<!-- resources: begin -->", PAGE + PAGE, "\n".join(PAGE.splitlines()[::-1])])
def test_a_page_without_its_markers(resources, tmp_path: Path, monkeypatch, capsys, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.setattr(resources, "triton_rows", lambda *arguments: pytest.fail("worked first"))
    monkeypatch.setattr(sys, "argv", ["resources.py", "--markdown", str(page)])
    with pytest.raises(SystemExit) as stopped:
        resources.main()
    assert stopped.value.code == 2 and "once each and in this order" in capsys.readouterr().err
    assert page.read_text() == text


def test_the_summary(resources) -> None:
    rows = [
        row(mma={"HGMMA": 8}, shared_bytes=66 << 10),
        row(registers=104, mma={"HMMA": 8}),
        row(target="sm_80", registers=90, shared_bytes=0),
        row(target="sm_80", registers=90, shared_bytes=0, shipped=False, spills=4),
        row(kernel="remask", backend="cuda", target="sm_90a", registers=30, spills=2),
    ]
    assert resources.markdown(rows).splitlines() == [
        "| kernel | sm_80 | sm_90 |",
        "|---|---|---|",
        "| `op.part` | 90, 0 B | 104-168, 66 K, HGMMA+HMMA |",
        "| `remask` (CUDA C++) | - | 30, 4 K, **spills (2 instructions, 0 bytes of stack)** |",
    ]
