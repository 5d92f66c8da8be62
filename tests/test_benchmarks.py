"""The benchmark scripts as their users run them, on the small preset with as few runs as there can be."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
QUICK = ("--device", "cpu", "--preset", "shapes", "--warmup", "0", "--repeats", "2", "--steps", "2")
KEYS = {"benchmark", "preset", "batch", "height", "width", "steps", "device", "rows", "versions", "commit", "time"}
ROW_KEYS = {"name", "dtype", "median_s", "p20_s", "p80_s", "images_per_s", "peak_bytes", "stages"}


def run(script, *arguments, **environment) -> subprocess.CompletedProcess:
    """One thread: several would wait for each other on a machine that does something else as well."""
    command = [sys.executable, str(script if isinstance(script, Path) else BENCHMARKS / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


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


@pytest.fixture(scope="module")
def latency(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """Where there is no compiler for torch.compile."""
    folder = tmp_path_factory.mktemp("latency")
    environment = {"CXX": str(folder / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    rows = ("eager-float32", "eager-bfloat16", "compile-float32")
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
    for row, dtype in zip(result["rows"], ("float32", "bfloat16"), strict=False):
        check_row(row, f"eager-{dtype}", dtype, 1)
    (parity,) = (
        line for line in done.stdout.splitlines() if line.strip().startswith("eager-bfloat16  ") and "ids" in line
    )
    assert parity.endswith(": ok")


def test_compile_without_a_compiler_is_unavailable(latency):
    done, _ = latency
    compiled = last_json(done.stdout)["rows"][2]
    assert set(compiled) == ROW_KEYS | {"unavailable"}
    assert compiled["name"] == "compile-float32" and compiled["median_s"] is None
    assert "ompiler" in compiled["unavailable"]
    assert f"compile-float32 is unavailable: {compiled['unavailable']}" in done.stdout


def test_throughput_of_a_low_precision_row_alone():
    """Images that are not square; the reference for the parity check is not among the rows."""
    size = ("--height", 64, "--width", 32, "--prompt-tokens", 9)
    done = run("throughput.py", *QUICK, "--bs", 3, *size, "--dtype", "bfloat16", "--rows", "eager")
    assert done.returncode == 0, done.stderr
    result = last_json(done.stdout)
    wanted = {"benchmark": "throughput --prompt-tokens 9", "batch": 3, "height": 64, "width": 32}
    assert {key: result[key] for key in wanted} == wanted
    (row,) = result["rows"]
    check_row(row, "eager-bfloat16", "bfloat16", 3)


RED = """
import sys
sys.path.insert(0, {folder!r})
import _harness, _session

build = _session.Session.build

def broken(self):
    name = build(self)
    if self.spec.dtype == "bfloat16":
        self.pipeline.generator.to_logits.weight.data.mul_(1.5)
    return name

_session.Session.build = broken  # also in the rows' processes: they import this script

if __name__ == "__main__":
    sys.exit(_harness.main("latency", 1, "", sys.argv[1:]))
"""


def test_red_parity_stops_before_any_timing(tmp_path):
    script = tmp_path / "red.py"
    script.write_text(RED.format(folder=str(BENCHMARKS)))
    done = run(script, *QUICK, "--rows", "eager-float32", "eager-bfloat16", "--json", tmp_path / "result.json")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "latency.py: error: parity check failed, nothing was timed: eager-bfloat16: logits is off by"
    )
    assert "median" not in done.stdout and "timed round" not in done.stderr
    assert not (tmp_path / "result.json").exists()


# ---- the parity rule


@pytest.fixture
def module(monkeypatch):
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def report(**changes) -> dict:
    values = {"errors": {"logits": 0.0}, "scales": {"logits": 10.0}, "unexplained_ids": 0, "agreement": 1.0}
    return values | {"step_agreement": 1.0, "residual": 0.0} | changes


@pytest.mark.parametrize(
    ("row", "changes", "plain", "red"),
    [
        ("float32", {"errors": {"logits": 0.9e-3}}, None, False),
        ("float32", {"errors": {"logits": 1.1e-3}}, None, True),
        ("float32", {"errors": {"logits": math.nan}}, None, True),
        ("float32", {"unexplained_ids": 1}, None, True),
        ("float32", {"agreement": 0.98, "residual": None}, None, True),
        ("float32", {"residual": 2e-3}, None, True),
        ("bfloat16", {"errors": {"logits": 0.23}, "agreement": 0.5}, {"logits": 0.1}, False),
        ("bfloat16", {"errors": {"logits": 0.25}}, {"logits": 0.1}, True),
        ("bfloat16", {"errors": {"logits": 1.2}}, None, False),
        ("bfloat16", {"errors": {"logits": 1.3}}, None, True),
        ("float16", {"errors": {"logits": 0.2}}, None, True),
    ],
)
def test_judge(module, row, changes, plain, red):
    from _session import RowSpec

    kind = "eager" if plain is None else "compile"
    assert bool(module("_parity").judge(RowSpec(kind, row), report(**changes), plain, "cpu")) is red


def test_what_surrounds_compiled_calls_changes_nothing(module, monkeypatch, tmp_path):
    """torch.compile itself takes too long for a test: here it gives its function back. Not square: no stored table."""
    import _session

    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: modes.append(mode) or function)
    work = _session.Workload("shapes", 2, 32, 64, 2, 5, "cpu")
    reference = _session.Session(_session.RowSpec("eager", "float32"), work)
    compiled = _session.Session(_session.RowSpec("compile", "float32", "default"), work)
    reference.build()
    compiled.build()
    assert modes == ["default"] * 3
    assert "forward" in vars(compiled.pipeline.generator.head) and "forward" not in vars(reference.pipeline.generator)
    reference.record_reference(str(tmp_path))
    report = compiled.parity(str(tmp_path))
    assert set(report["errors"]) == {"text", "logits", "head", "image"}
    assert max(report["errors"].values()) == 0 and min(report["scales"].values()) > 0.01
    assert report["agreement"] == report["step_agreement"] == 1 and report["residual"] == 0
    assert module("_parity").judge(compiled.spec, report, None, "cpu") == []


def test_percentiles_are_numpys(module):
    values = [3.0, 1.0, 7.0, 2.0, 2.5]
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        wanted = torch.quantile(torch.tensor(values, dtype=torch.float64), share).item()
        assert module("_report").percentile(values, share) == pytest.approx(wanted)
    assert module("_report").percentile([4.0], 0.8) == 4.0


# ---- bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--bs 0", "argument --bs: must be an integer >= 1, got '0'"),
        ("--bs two", "argument --bs: must be an integer >= 1, got 'two'"),
        ("--steps 300", "argument --steps: must be an integer in 1..256, got '300'"),
        ("--repeats 0", "argument --repeats: must be an integer >= 1, got '0'"),
        ("--warmup -1", "argument --warmup: must be an integer >= 0, got '-1'"),
        ("--dtype float8", "argument --dtype: invalid choice: 'float8'"),
        ("--preset big", "argument --preset: invalid choice: 'big'"),
        ("--device tpu", "argument --device: must be cpu, cuda or cuda:N, got 'tpu'"),
        ("--device cuda:99", "argument --device: cuda:99 was asked for, but"),
        ("--preset shapes --height 65", "argument --height: must be a multiple of 8 for shapes, got 65"),
        ("--preset dc-ar-512 --width 500", "argument --width: must be a multiple of 32 for dc-ar-512, got 500"),
        ("--preset shapes --prompt-tokens 129", "argument --prompt-tokens: shapes takes at most 128, got 129"),
        ("--rows fast", "argument --rows: unknown row 'fast'"),
        ("--rows eager-int8", "argument --rows: unknown row 'eager-int8'"),
        ("--rows compile:fastest", "argument --rows: unknown row 'compile:fastest'"),
        ("--rows eager:default", "argument --rows: 'eager:default' names a compile mode"),
        ("--rows eager-float32 --dtype bfloat16", "argument --rows: 'eager-float32' contradicts --dtype bfloat16"),
        ("--rows eager eager-float32", "argument --rows: eager-float32 is named twice"),
        ("--json /nowhere/result.json", "argument --json: cannot write /nowhere/result.json"),
        ("--colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_bad_arguments_are_one_line(module, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        module("_arguments").parse("latency", 1, "", arguments.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"latency.py: error: {message}") and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there():
    done = run("throughput.py", "--device", "cuda")
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("throughput.py: error: argument --device: cuda was asked for, but torch")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--preset shapes", ["eager-float32", "eager-bfloat16"]),
        ("--preset dc-ar-512", ["eager-float32", "eager-bfloat16"]),
        ("--preset shapes --dtype bfloat16", ["eager-bfloat16"]),
        ("--rows eager compile:max-autotune --dtype float16", ["eager-float16", "compile-float16:max-autotune"]),
        ("--rows compile compile:reduce-overhead", ["compile-float32", "compile-float32:reduce-overhead"]),
        ("--rows compile --compile-mode reduce-overhead", ["compile-float32:reduce-overhead"]),
    ],
)
def test_rows(module, arguments, names):
    settings = module("_arguments").parse("latency", 1, "", ["--device", "cpu", *arguments.split()])
    assert [row.name for row in settings.rows] == names


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
    assert "eager-bfloat16: not in NEW" in compared.stdout
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


# ---- roofline.py


def test_roofline():
    done = run("roofline.py", "--preset", "dc-ar-512", "--gpu", "h200")
    assert done.returncode == 0, done.stderr
    assert "790 TFLOP/s (measured), 4.3 TB/s (measured)" in done.stdout
    rows = {line[:18].strip(): line[18:].split() for line in done.stdout.splitlines()}
    assert list(rows)[3:10] == [
        "stage",
        "text encoder",
        "text keys, values",
        "trunk",
        "logits",
        "diffusion head",
        "decoder",
    ]
    assert float(rows["trunk"][0]) == pytest.approx(6.646, rel=1e-3)  # TFLOP
    assert float(rows["decoder"][0]) == pytest.approx(2.769, rel=1e-3)
    parts = [float(rows[name][3]) for name in list(rows)[4:10]]
    assert float(rows["all"][3]) == pytest.approx(sum(parts), rel=0.02)  # milliseconds
    assert float(rows["all"][3]) >= float(rows["all"][0]) / 790 * 1e3 * 0.99


def test_roofline_with_own_ceilings_and_bad_ones():
    own = ("--preset", "shapes", "--gpu", "a100", "--tflops", 100, "--bandwidth", 0.5, "--dtype", "float32")
    done = run("roofline.py", *own)
    assert done.returncode == 0, done.stderr
    assert "100 TFLOP/s (given), 0.5 TB/s (given)" in done.stdout
    done = run("roofline.py", "--tflops", "nan")
    assert done.returncode == 2
    assert done.stderr == "roofline.py: error: argument --tflops: must be a number above 0, got 'nan'\n"


def test_roofline_png(tmp_path):
    """The picture, or one line that says what is missing."""
    picture = tmp_path / "roofline.png"
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "matplotlib.py").write_text("raise ModuleNotFoundError('no matplotlib')\n")
    done = run("roofline.py", "--preset", "shapes", "--png", picture, PYTHONPATH=str(hidden))
    assert done.returncode == 2 and not picture.exists()
    assert done.stderr.startswith("roofline.py: error: argument --png: needs matplotlib")
    if importlib.util.find_spec("matplotlib") is None:
        return
    done = run("roofline.py", "--preset", "shapes", "--png", picture)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 800
        colours = image.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 50  # something was drawn
