"""precision.py: what it reports of engines that are right, and of one that is not."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.benchmark_scripts import import_module, run  # noqa: F401  (a fixture)
from tests.test_benchmarks import last_json


def test_report(tmp_path) -> None:
    rows = ("fast-float32", "eager-bfloat16", "fast-bfloat16", "fast-fp8")
    file = tmp_path / "p.json"
    done = run("precision.py", "--device", "cpu", "--steps", 3, "--bs", 2, "--rows", *rows, "--json", file)
    assert done.returncode == 0, done.stderr
    result = last_json(done.stdout)
    assert json.loads(file.read_text()) == result and result["weights"] == "random" and result["batch"] == 2
    found = {row["name"]: row for row in result["rows"]}
    assert list(found) == list(rows)
    exact, plain, fast = (found[name] for name in rows[:3])
    assert exact["step_agreement"] == [1.0] * 3 and exact["free_agreement"] == 1.0
    assert exact["residual"]["max"] < 1e-4 and (exact["psnr_free"] or math.inf) > 60
    for row in (plain, fast):
        assert all(0.5 < share <= 1 for share in row["step_agreement"]) and 0.5 < row["free_agreement"] <= 1
        residual = row["residual"]
        assert 0 < residual["rms"] < residual["max"] and 1e-4 < residual["relative"] < 0.2
        assert 20 < row["psnr_tokens"] < 70
    assert fast["residual"]["relative"] < 2 * plain["residual"]["relative"]
    eight = found["fast-fp8"]
    assert all(0.3 < share <= 1 for share in eight["step_agreement"]) and 0.3 < eight["free_agreement"] < 1
    assert 2 * fast["residual"]["relative"] < eight["residual"]["relative"] < 0.5
    assert "on CUDA devices, this is cpu" in eight["emulated"] and fast["emulated"] is plain["emulated"] is None
    assert f"fast-fp8 is emulated in plain PyTorch: {eight['emulated']}" in done.stdout
    table = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "100.00%" in table["fast-float32"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """Trained, as the folder says, so that the report has to say it too."""
    from dcar_fast import DCARPipeline

    pipeline = DCARPipeline.from_preset("shapes", seed=0, device="cpu")
    pipeline.trained = True
    folder = str(tmp_path_factory.mktemp("weights"))
    pipeline.save_pretrained(folder)
    return folder


def test_what_is_wrong_shows(module, monkeypatch, weights) -> None:
    """Another order of the codes, which the first step, nearly all noise, hardly sees; another end of the head."""
    precision, work = module("_precision"), module("_work").Workload("shapes", 1, 32, 32, 3, 8, "cpu")
    reference = precision.Reference(weights, work, (4, 4), 1)
    assert reference.trained and [int((ids == reference.mask_id).sum()) for ids in reference.ids_in][0] == 16
    right = precision.compare(reference, "fast", "float32")
    assert right["step_agreement"] == [1.0] * 3 and right["free_agreement"] == 1.0
    load = precision.load

    def broken(*args):
        pipeline = load(*args)
        with torch.no_grad():
            pipeline.generator.to_logits.weight.copy_(pipeline.generator.to_logits.weight.roll(1, 0))
            pipeline.generator.head.final_layer.linear.weight.normal_(0, 0.1)
        return pipeline

    monkeypatch.setattr(precision, "load", broken)
    wrong = precision.compare(reference, "fast", "float32")
    assert wrong["step_agreement"][-1] < 0.2 and wrong["free_agreement"] < 0.8
    assert wrong["residual"]["relative"] > 100 * max(right["residual"]["relative"], 1e-6)
    assert wrong["psnr_free"] < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rows eager-float32", "argument --rows: 'eager-float32' is the reference itself"),
        ("--rows compile-bfloat16", "argument --rows: unknown row 'compile-bfloat16'"),
        ("--rows eager-fp8", "argument --rows: unknown row 'eager-fp8'"),
        ("--rows fast-bfloat16 fast-bfloat16", "argument --rows: fast-bfloat16 is named twice"),
        ("--json /nowhere/p.json", "argument --json: cannot write /nowhere/p.json"),
    ],
)
def test_bad_arguments_are_one_line(module, capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        module("precision").main(arguments.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"precision.py: error: {message}") and error.count("\n") == 1
