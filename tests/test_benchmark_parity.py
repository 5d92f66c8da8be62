"""The parity gate in front of the timed benchmarks: that it is passed, and that it can fail."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from tests.benchmark_scripts import BENCHMARKS, import_module, run  # noqa: F401  (a fixture)
from tests.test_benchmarks import QUICK, check_row, last_json


def test_throughput_of_a_low_precision_row_alone(tmp_path):
    """Images that are not square; the reference for the parity check is not among the rows."""
    size = ("--height", 64, "--width", 32, "--prompt-tokens", 9)
    more = ("--dtype", "bfloat16", "--rows", "eager", "--weights", tmp_path / "weights")
    done = run("throughput.py", *QUICK, "--bs", 3, *size, *more)
    assert done.returncode == 0, done.stderr
    result = last_json(done.stdout)
    wanted = {"benchmark": "throughput --prompt-tokens 9", "batch": 3, "height": 64, "width": 32}
    assert {key: result[key] for key in wanted} == wanted
    (row,) = result["rows"]
    check_row(row, "eager-bfloat16", "bfloat16", 3)
    assert {path.name for path in (tmp_path / "weights").iterdir()} >= {"config.json"}  # for the next command


RED = """
import sys
sys.path.insert(0, {folder!r})
import _harness, _session

build = _session.Session.build

def broken(self):
    name = build(self)
    if self.spec.kind == "fast":
        self.pipeline.generator.to_logits.weight.data.mul_(1.01)
    return name

_session.Session.build = broken  # also in the rows' processes: they import this script

if __name__ == "__main__":
    sys.exit(_harness.main("latency", 1, "", sys.argv[1:]))
"""


def test_red_parity_stops_before_any_timing(tmp_path):
    script = tmp_path / "red.py"
    script.write_text(RED.format(folder=str(BENCHMARKS)))
    done = run(script, *QUICK, "--rows", "eager-float32", "fast-float32", "--json", tmp_path / "result.json")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("latency.py: error: parity check failed, nothing was timed: fast-float32: logits is off by")
    assert "median" not in done.stdout and "timed round" not in done.stderr
    assert not (tmp_path / "result.json").exists()


# ---- the parity rule


def report(**changes) -> dict:
    values = {"errors": {"logits": 0.0}, "scales": {"logits": 10.0}, "unexplained_ids": 0, "agreement": 1.0}
    return values | {"step_agreement": 1.0, "residual": 0.0, "whole_agreement": None, "psnr": None} | changes


PLAIN = {"errors": {"logits": 0.1, "residual": 0.02, "image": 0.1}, "whole_agreement": 0.5}


@pytest.mark.parametrize(
    ("row", "changes", "plain", "red"),
    [
        ("float32", {"errors": {"logits": 0.9e-3}}, None, False),
        ("float32", {"errors": {"logits": 1.1e-3}}, None, True),
        ("float32", {"errors": {"logits": math.nan}}, None, True),
        ("float32", {"unexplained_ids": 1}, None, True),
        ("float32", {"agreement": 0.98, "residual": None}, None, True),
        ("float32", {"residual": 2e-3}, None, True),
        ("float32", {"errors": {"residual": 0.9e-3}, "scales": {"residual": 0.1}}, None, False),
        ("float32", {"errors": {"residual": 1.1e-3}, "scales": {"residual": 9.0}}, None, True),
        ("float32", {"whole_agreement": 0.98}, None, False),
        ("float32", {"whole_agreement": 0.96}, None, True),
        ("bfloat16", {"errors": {"logits": 0.23}, "agreement": 0.5}, PLAIN, False),
        ("bfloat16", {"errors": {"logits": 0.25}}, PLAIN, True),
        ("bfloat16", {"errors": {"residual": 0.041}, "scales": {"residual": 0.5}}, PLAIN, False),
        ("bfloat16", {"errors": {"residual": 0.043}, "scales": {"residual": 0.5}}, PLAIN, True),
        ("bfloat16", {"whole_agreement": 0.26}, PLAIN, False),
        ("bfloat16", {"whole_agreement": 0.24}, PLAIN, True),
        ("bfloat16", {"errors": {"logits": 1.2}}, None, False),
        ("bfloat16", {"errors": {"logits": 1.3}}, None, True),
        ("bfloat16", {"errors": {"residual": 9.0}, "scales": {"residual": 0.5}, "whole_agreement": 0.1}, None, False),
        ("bfloat16", {"errors": {"residual": math.nan}, "scales": {"residual": 0.5}}, None, True),
        ("float16", {"errors": {"logits": 0.2}}, None, True),
        ("fp8", {"errors": {"logits": 4.9}}, PLAIN, False),
        ("fp8", {"errors": {"logits": 5.1}}, PLAIN, True),
        ("fp8", {"errors": {"image": 0.23}, "scales": {"image": 10.0}}, PLAIN, False),
        ("fp8", {"errors": {"image": 0.25}, "scales": {"image": 10.0}}, PLAIN, True),
        ("fp8", {"errors": {"residual": 9.0}, "scales": {"residual": 0.5}}, PLAIN, False),
        ("fp8", {"errors": {"residual": math.nan}, "scales": {"residual": 0.5}}, PLAIN, True),
        ("fp8", {"whole_agreement": 0.13}, PLAIN, False),
        ("fp8", {"whole_agreement": 0.12}, PLAIN, True),
    ],
)
def test_judge(module, row, changes, plain, red):
    from _work import RowSpec

    kind = "eager" if plain is None else "fast"
    assert bool(module("_parity").judge(RowSpec(kind, row), report(**changes), plain, "cpu")) is red


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A pipeline with random weights, none of them zero."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from _weights import weights

        with weights("shapes", str(tmp_path_factory.mktemp("weights") / "shapes")) as found:
            return found
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_what_surrounds_compiled_calls_changes_nothing(module, monkeypatch, tmp_path, folder):
    """torch.compile itself takes too long for a test: here it gives its function back. Not square: no stored table."""
    import _session
    from _work import RowSpec, Workload

    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: modes.append(mode) or function)
    work = Workload("shapes", 2, 32, 64, 2, 5, "cpu")
    reference = _session.Session(RowSpec("eager", "float32"), work, folder)
    compiled = _session.Session(RowSpec("compile", "float32", "default"), work, folder)
    reference.build()
    compiled.build()
    assert modes == ["default"] * 3
    assert "forward" in vars(compiled.pipeline.generator.head) and "forward" not in vars(reference.pipeline.generator)
    reference.record_reference(str(tmp_path))
    report = compiled.parity(str(tmp_path))
    assert set(report["errors"]) == {"text", "logits", "head", "residual", "image"}
    assert max(report["errors"].values()) == 0 and min(report["scales"].values()) > 0.01
    assert report["agreement"] == report["step_agreement"] == report["whole_agreement"] == 1
    assert report["residual"] == 0 and report["psnr"] == math.inf
    assert module("_parity").judge(compiled.spec, report, None, "cpu") == []


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("engine/head.py", "residual"),
        ("engine/decoder.py", "image"),
        ("noise", "ids"),
    ],
)
def test_the_probes_see_what_is_wrong_with_the_fast_engine(module, monkeypatch, tmp_path, folder, part, name):
    """Each of its parts broken once, as little as a wrong constant would."""
    import _session
    from _work import RowSpec, Workload

    from dcar_fast.engine import decoder, head
    from dcar_fast.sampling import _draws

    work = Workload("shapes", 1, 32, 32, 2, 5, "cpu")
    reference = _session.Session(RowSpec("eager", "float32"), work, folder)
    fast = _session.Session(RowSpec("fast", "float32"), work, folder)
    reference.build()
    fast.build()
    reference.record_reference(str(tmp_path))
    judge = module("_parity").judge
    assert judge(fast.spec, fast.parity(str(tmp_path)), None, "cpu") == []
    if part == "engine/head.py":
        run = head.Head.__call__
        monkeypatch.setattr(head.Head, "__call__", lambda *args, **options: run(*args, **options) * 1.1)
    elif part == "engine/decoder.py":
        decode = decoder.FastDecoder.decode_tokens
        monkeypatch.setattr(decoder.FastDecoder, "decode_tokens", lambda *args: decode(*args) + 0.01)
    else:
        draw = _draws.SeededDraws.token
        monkeypatch.setattr(_draws.SeededDraws, "token", lambda self, step, rows: draw(self, step + 1, rows))
    problems = judge(fast.spec, fast.parity(str(tmp_path)), None, "cpu")
    assert name in " ".join(problems)


def test_a_row_in_float8(module, monkeypatch, tmp_path, folder):
    """On a CPU it is refused with the reason; emulated, it passes the rule, and is seen to be in float8."""
    import _session
    from _work import RowSpec, Workload

    work = Workload("shapes", 1, 32, 32, 2, 5, "cpu")
    rows = [
        RowSpec(*row) for row in (("eager", "float32"), ("eager", "bfloat16"), ("fast", "bfloat16"), ("fast", "fp8"))
    ]
    reference, plain, fast, eight = (_session.Session(row, work, folder) for row in rows)
    with pytest.raises(ValueError, match="fp8 needs a GPU of compute capability 8.9 or newer, this is cpu"):
        eight.build()
    monkeypatch.setenv("DCAR_FAST_BACKEND", "reference")
    for session in (reference, plain, fast, eight):
        session.build()
    reference.record_reference(str(tmp_path))
    reports = [session.parity(str(tmp_path)) for session in (plain, fast, eight)]
    assert module("_parity").judge(eight.spec, reports[2], reports[0], "cpu") == []
    assert reports[2]["errors"]["logits"] > 2 * reports[1]["errors"]["logits"]
    assert reports[2]["errors"]["text"] == reports[1]["errors"]["text"]
    assert eight.run(1) > 0


def test_every_run_has_seeds_and_prompts_of_its_own(module):
    from _work import Workload

    work = Workload("shapes", 3, 32, 32, 2, 5, "cpu")
    seeds = [seed for run in (0, 1, 1_000_000, 3_000_000) for seed in work.seeds(run)]
    assert len(set(seeds)) == 12 and all(0 <= seed < 2**63 for seed in seeds)
    assert work.prompts(0) != work.prompts(1) and len(work.prompts(0)[0]) == 4
