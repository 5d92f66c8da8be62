"""The command lines of latency.py and throughput.py."""

from __future__ import annotations

import pytest
import torch

from tests.benchmark_scripts import import_module, run  # noqa: F401  (a fixture)


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
        ("--rows quick", "argument --rows: unknown row 'quick'"),
        ("--rows fast:default", "argument --rows: 'fast:default' names a compile mode"),
        ("--rows eager-fp8", "argument --rows: unknown row 'eager-fp8'"),
        ("--rows fast-fp8 --dtype bfloat16", "argument --rows: 'fast-fp8' contradicts --dtype bfloat16"),
        ("--rows eager-int8", "argument --rows: unknown row 'eager-int8'"),
        ("--rows compile:fastest", "argument --rows: unknown row 'compile:fastest'"),
        ("--rows eager:default", "argument --rows: 'eager:default' names a compile mode"),
        ("--rows eager-float32 --dtype bfloat16", "argument --rows: 'eager-float32' contradicts --dtype bfloat16"),
        ("--rows eager eager-float32", "argument --rows: eager-float32 is named twice"),
        ("--profile /nowhere/t.json.gz", "argument --profile: cannot write /nowhere/t.json.gz"),
        ("--device cpu --rows fast --profile-range", "argument --profile-range: Nsight sees GPUs only"),
        ("--device cpu --rows fast --nvtx", "argument --nvtx: Nsight sees GPUs only"),
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
        ("--preset shapes", ["eager-float32", "eager-bfloat16", "fast-float32", "fast-bfloat16"]),
        ("--preset dc-ar-512", ["eager-float32", "eager-bfloat16", "fast-float32", "fast-bfloat16"]),
        ("--preset shapes --dtype bfloat16", ["eager-bfloat16", "fast-bfloat16"]),
        ("--rows fast fast-float16", ["fast-float32", "fast-float16"]),
        ("--rows eager compile:max-autotune --dtype float16", ["eager-float16", "compile-float16:max-autotune"]),
        ("--rows compile compile:reduce-overhead", ["compile-float32", "compile-float32:reduce-overhead"]),
        ("--rows compile --compile-mode reduce-overhead", ["compile-float32:reduce-overhead"]),
    ],
)
def test_rows(module, arguments, names):
    settings = module("_arguments").parse("latency", 1, "", ["--device", "cpu", *arguments.split()])
    assert [row.name for row in settings.rows] == names
    assert [row.engine for row in settings.rows] == ["fast" if n.startswith("fast") else "reference" for n in names]


def test_the_rows_of_a_gpu(module, monkeypatch):
    arguments = module("_arguments")
    monkeypatch.setattr(arguments, "check_device", lambda parser, device: "cuda")
    rows = arguments.parse("latency", 1, "", []).rows
    assert [row.name for row in rows[:4]] == ["eager-float32", "eager-bfloat16", "fast-float32", "fast-bfloat16"]
    assert [row.name for row in rows[4:]] == ["compile-bfloat16:max-autotune"]
    assert [row.name for row in arguments.parse("latency", 1, "", ["--dtype", "float16"]).rows] == [
        "eager-float16",
        "fast-float16",
        "compile-float16:max-autotune",
    ]
    one = ["--rows", "fast-bfloat16"]
    assert arguments.parse("latency", 1, "", [*one, "--profile-range"]).marked == "range"
    assert arguments.parse("latency", 1, "", [*one, "--nvtx"]).marked == "stages"
    with pytest.raises(SystemExit):
        arguments.parse("latency", 1, "", [*one, "eager", "--nvtx"])


def test_the_trace_has_a_name(module):
    parse = module("_arguments").parse
    assert str(parse("latency", 1, "", ["--device", "cpu", "--profile"]).trace) == "latency-trace.json.gz"
    assert parse("latency", 1, "", ["--device", "cpu"]).trace is None
