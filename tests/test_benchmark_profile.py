"""--profile, --profile-range and --nvtx of the timed benchmarks, the latter with a profiler that is made up."""

from __future__ import annotations

import gzip
import json
from contextlib import contextmanager

import pytest
import torch

from tests.benchmark_scripts import import_module, run  # noqa: F401  (a fixture)
from tests.test_benchmarks import QUICK, last_json


def test_a_trace(tmp_path) -> None:
    """Of the fast row, with one run as it is timed and one by stages; its longest operations are printed."""
    file = tmp_path / "trace.json.gz"
    done = run("latency.py", *QUICK, "--rows", "fast-float32", "eager-float32", "--profile", file)
    assert done.returncode == 0, done.stderr
    assert f"fast-float32, one run as timed and one by stages, in {file}" in done.stdout
    assert "Self CPU time total" in done.stdout and "aten::" in done.stdout
    with gzip.open(file) as opened:
        events = [event for event in json.load(opened)["traceEvents"] if event.get("cat") == "user_annotation"]
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events}
    (timed, by_stages) = spans["run as timed"], spans["run by stages"]
    assert timed[1] <= by_stages[0]
    for name in ("text", "unmask 0", "unmask 1", "head", "denoise 0", "denoise 15", "decode"):
        assert by_stages[0] <= spans[name][0] < spans[name][1] <= by_stages[1], name
    assert [row["name"] for row in last_json(done.stdout)["rows"]] == ["fast-float32", "eager-float32"]


@pytest.mark.parametrize("option", ["--profile-range", "--nvtx"])
def test_the_marks_enclose_exactly_the_timed_runs(module, monkeypatch, capsys, tmp_path, option) -> None:
    """The row runs in this process, where everything it does is logged."""
    arguments, harness, session = module("_arguments"), module("_harness"), module("_session")
    log: list[object] = []
    monkeypatch.setattr(arguments, "check_marks", lambda *_: None)  # "needs a GPU"
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: log.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: log.append("stop"))
    one_run = session.Session.run
    monkeypatch.setattr(session.Session, "run", lambda self, index: log.append(index) or one_run(self, index))

    @contextmanager
    def span(name: str, index: int | None):
        log.append(f"{name}")
        yield

    monkeypatch.setattr("dcar_fast.profiling._nvtx_range", lambda: span)
    work = ["--device", "cpu", "--preset", "shapes", "--steps", "2", "--warmup", "1", "--repeats", "3"]
    monkeypatch.setattr(harness, "check_parity", lambda *_: None)  # tested elsewhere
    status = harness.main("latency", 1, "", [*work, "--rows", "fast-float32", option])
    assert status == 0
    (row,) = last_json(capsys.readouterr().out)["rows"]
    assert row["median_s"] > 0 and row["stages"] == {} and row["first_s"] is None
    stages = ["text", "unmask", "unmask", "head", *["denoise"] * 16, "decode"] if option == "--nvtx" else []
    timed = [entry for index in range(3) for entry in (index, *stages)]
    assert log == [3_000_000, 1_000_000, "start", *timed, "stop"]


def test_the_marks_close_after_an_error(module) -> None:
    log: list[str] = []

    class Profiler:
        start, stop = staticmethod(lambda: log.append("start")), staticmethod(lambda: log.append("stop"))

    def fail() -> list[float]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        module("_session").run_between_marks(Profiler, fail)
    assert log == ["start", "stop"]


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["--profile-range", "--nvtx"])
def test_the_marks_on_a_gpu(option) -> None:
    """Without a profiler the marks do nothing, and the row runs as ever."""
    work = ("--device", "cuda", "--preset", "shapes", "--steps", 2, "--warmup", 1, "--repeats", 2)
    done = run("latency.py", *work, "--rows", "fast-bfloat16", option)
    assert done.returncode == 0, done.stderr
    (row,) = last_json(done.stdout)["rows"]
    assert row["median_s"] > 0 and row["remarks"] == []
