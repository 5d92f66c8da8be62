"""The suite as it is called, and its pieces with commands and outputs that are made up."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.py"
COMMAND = [sys.executable, str(SUITE), "--device", "cpu", "--quick"]
NO_GPU = "needs a GPU: "


@pytest.fixture(scope="module")
def module():
    """Imports a module of benchmarks/ by name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


def read(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


# ---- as it is called


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("suite") / "new" / "folder"
    out.mkdir(parents=True)
    (out / "profile.txt").write_text("an earlier run's")
    (out / "mine.txt").write_text("not the suite's")
    parts = ["--parts", "environment", "ceilings", "kernels", "tests", "sanitizer", "--ops", "vq_lookup"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*COMMAND, "--out", str(out), *parts], capture_output=True, text=True, env=environment, timeout=300
    )
    return done, out


def test_the_parts_of_a_cpu(finished) -> None:
    done, out = finished
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read(out)
    assert summary["stopped"] is None and summary["environment"]["versions"]["torch"] == torch.__version__
    status = {step["name"]: (step["status"], step["reason"]) for step in summary["steps"]}
    missing = "needs a GPU: --device cpu"
    assert status == {
        "environment": ("ok", ""),
        "ceilings": ("ok", ""),
        "kernels vq_lookup": ("ok", ""),
        "tests": ("unavailable", missing),
        "sanitizer memcheck": ("unavailable", missing),
        "sanitizer racecheck": ("unavailable", missing),
    }
    assert "no GPU (--device cpu)" in done.stdout and "to keep it: mkdir -p benchmarks/results/cpu-" in done.stdout


def test_its_files(finished) -> None:
    _, out = finished
    wanted = {"summary.json", "summary.md", "environment.json", "kernels.json", "logs.txt", "mine.txt"}
    assert {path.name for path in out.iterdir()} == wanted
    (kernel,) = json.loads((out / "kernels.json").read_text())
    assert kernel["benchmark"] == "vq_lookup" and kernel["results"]["reference"]["median_ms"] > 0
    assert json.loads((out / "environment.json").read_text()) == read(out)["environment"]
    logs = (out / "logs.txt").read_text()
    assert "===== kernels vq_lookup" in logs and "parity reference" in logs
    page = (out / "summary.md").read_text()
    assert "| vq_lookup | " in page and "| bfloat16 product | " in page and "% of the ceiling" in page
    assert page in finished[0].stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_suite_leaves_what_was_done(tmp_path: Path, number: signal.Signals) -> None:
    """Full sizes on a CPU take minutes; the suite is stopped as soon as its first step is done."""
    out = tmp_path / "out"
    command = [sys.executable, str(SUITE), "--device", "cpu", "--out", str(out), "--parts", "resources"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("resources ..."):
            break
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130, errors
    assert "stopped; what was done is kept" in errors
    summary = read(out)
    assert summary["stopped"] == ("SIGTERM" if number == signal.SIGTERM else "interrupted")
    assert [(s["name"], s["status"]) for s in summary["steps"]] == [("environment", "ok"), ("resources", "interrupted")]
    assert "**Stopped early" in (out / "summary.md").read_text()
    assert not [line for line in command_lines() if str(out) in line], "the part that ran was ended too"


def command_lines(processes: list[int] | None = None) -> list[str]:
    """Of these processes, or of every one there is."""
    assert Path("/proc/self/cmdline").exists()
    found = []
    for path in [Path(f"/proc/{process}/cmdline") for process in processes or ()] or Path("/proc").glob(
        "[0-9]*/cmdline"
    ):
        with contextlib.suppress(OSError):  # it has ended
            found.append(path.read_text(errors="replace"))
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "{tmp}", "--minutes", "0"], "argument --minutes: must be above 0, got 0.0"),
        (["--out", "{tmp}", "--minutes", "nan"], "argument --minutes: must be above 0, got nan"),
        (["--out", "{tmp}", "--parts", "everything"], "argument --parts: invalid choice: 'everything'"),
        (["--out", "{tmp}", "--ops", "softmax"], "argument --ops: there is no benchmark of 'softmax', there are"),
        (["--out", "{tmp}/file/x"], "argument --out: cannot write to {tmp}/file/x: Not a directory"),
    ],
)
def test_bad_arguments_are_one_line(module, tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        module("gpu_suite").main([argument.format(tmp=tmp_path) for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in error and error.count("\n") == 1


# ---- one command


def test_output_and_status_of_a_command(module, tmp_path: Path) -> None:
    run = module("_suite.process").run
    done = run(["sh", "-c", "echo out; echo $NAME >&2; exit 3"], 20, tmp_path, {"NAME": "value"})
    assert (done.code, done.output, done.timed_out) == (3, "out\nvalue\n", False)
    done = run(["/no/such/tool"], 20, tmp_path, {})
    assert done.code is None and done.output == "/no/such/tool cannot be started: No such file or directory"
    assert run(["sh", "-c", "cat; printf '\\377'"], 20, tmp_path, {}).output == "\ufffd", "no input, any bytes"


@pytest.mark.parametrize("ignore", ["", "trap '' INT; "])
def test_a_command_that_takes_too_long(module, tmp_path: Path, monkeypatch, ignore: str) -> None:
    """It is interrupted, or killed if it does not listen, and so is what it started."""
    process = module("_suite.process")
    monkeypatch.setattr(process, "GRACE", 0.5)
    script = f"{ignore}echo begun; sleep 321.5 & echo $! > child; wait"
    done = process.run(["bash", "-c", script], 1.5, tmp_path, {})
    assert (done.code, done.timed_out, done.output) == (None, True, "begun\n")
    assert 0.9 < done.seconds < 20
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10  # a killed process still needs a moment
    while (alive := "sleep\x00321.5" in "".join(command_lines([child]))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def test_long_outputs_keep_both_ends(module) -> None:
    shorten = module("_suite.process").shorten
    assert shorten("a" * 100, 100) == "a" * 100
    text = shorten("a" * 500 + "b" * 500, 100)
    assert text.startswith("a" * 25 + "\n[... 900 characters") and text.endswith("]\n" + "b" * 75)


# ---- the time, and steps that fail


@pytest.fixture
def suite(module, tmp_path: Path):
    """A suite of a minute, and a maker of steps that run a shell script."""
    gpu_suite, judge = module("gpu_suite"), module("_suite.judge")
    made = gpu_suite.Suite(tmp_path, 1, ["--out", "x"])

    def step(script: str, name: str = "step", verdict=judge.finished, limit: float = 20, **more):
        return module("_suite.steps").Step(name, "part", ("sh", "-c", script), verdict, limit, **more)

    return made, step


def test_a_failure_is_kept_and_the_rest_goes_on(suite, tmp_path: Path) -> None:
    made, step = suite
    made.do(step("echo 'ValueError: it broke'; echo bye; exit 1", "first"))
    made.do(step("true", "second"))
    assert [(s["name"], s["status"]) for s in read(tmp_path)["steps"]] == [("first", "failed"), ("second", "ok")]
    assert read(tmp_path)["steps"][0]["reason"] == "exit status 1: ValueError: it broke"
    assert made.status() == 1


def test_what_cannot_run_is_no_failure(suite, tmp_path: Path) -> None:
    made, step = suite
    made.do(step("touch ran", missing="no such tool"))
    assert made.records[0]["status"] == "unavailable" and made.records[0]["reason"] == "no such tool"
    assert made.status() == 0 and not (tmp_path / "ran").exists()


def test_what_no_longer_fits_is_skipped(suite) -> None:
    made, step = suite
    made.deadline = time.monotonic() + 12
    assert made.do(step("exit 1", least=30, limit=40)).status == "skipped"
    assert made.records[0]["reason"].startswith("needs 30 s, 1")
    assert made.do(step("true", least=10)).status == "ok"
    made.deadline = time.monotonic() - 1
    assert made.do(step("true", least=10)).reason == "needs 10 s, 0 s are left"
    assert made.status() == 0


def test_a_step_gets_no_more_than_what_is_left(suite, module, monkeypatch) -> None:
    made, step = suite
    limits = []

    def run(command, limit, folder, environment):
        limits.append(limit)
        return module("_suite.process").Done(0, "", 0.0)

    monkeypatch.setattr(module("gpu_suite"), "run", run)
    made.do(step("", limit=500))
    made.do(step("", limit=20))
    assert 59 < limits[0] <= 60 and limits[1] == 20


def test_the_path_of_the_caller_is_kept(module) -> None:
    code = "import gpu_suite; print(gpu_suite.ENVIRONMENT['PYTHONPATH'])"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'benchmarks'}{os.pathsep}/carried"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith(f"{os.pathsep}/carried"), done.stderr


def test_files_stay_below_the_limit(suite, tmp_path: Path) -> None:
    made, step = suite
    made.logs = {f"step {i}": "\u2026" * (256 << 10) for i in range(40)}
    made.do(step("true"))
    assert 1 << 20 < (tmp_path / "logs.txt").stat().st_size < 16 << 20


# ---- judgements


def done(module, output: str, code: int | None = 0, timed_out: bool = False):
    return module("_suite.process").Done(code, output, 12.0, timed_out)


def test_the_last_line_of_json(module) -> None:
    last_json = module("_suite.judge").last_json
    assert last_json(done(module, '{"a": 1}\n{"a": 2}\n[3]\nWarning: late\n')).result == {"a": 2}
    assert last_json(done(module, "no\n")) == ("failed", "it printed no line of JSON", None)
    assert last_json(done(module, '{"a": \n')).status == "failed"
    assert last_json(done(module, '{"a": 1}', code=1)).result is None
    assert last_json(done(module, "", code=None, timed_out=True)).reason == "ran out of its 12 s"
    assert last_json(done(module, "", code=1)).reason == "exit status 1: no output"


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/><testcase classname="tests.a" name="two"/>
<testcase classname="tests.b" name="three"><skipped message="no"/></testcase>{more}
</testsuite></testsuites>"""
FAILED = '<testcase classname="tests.c" name="four"><failure message="assert 1 == 2&#10;more"/></testcase>'


def test_judging_tests(module, tmp_path: Path) -> None:
    judge, file = module("_suite.judge").tests, tmp_path / "junit.xml"
    file.write_text(JUNIT.format(more=""))
    good = judge(done(module, ""), file)
    assert good[:2] == ("ok", "2 passed, 1 skipped") and good.result["failures"] == []
    file.write_text(JUNIT.format(more=FAILED))
    bad = judge(done(module, "", code=1), file)
    assert bad[:2] == ("failed", "2 passed, 1 failed, 1 skipped")
    assert bad.result["failures"] == [{"test": "tests.c::four", "message": "assert 1 == 2"}]
    assert judge(done(module, "x", code=None, timed_out=True), file).reason.endswith("; ran out of its 12 s")
    file.write_text("<testsuites></testsuites>")
    assert judge(done(module, "no tests ran", code=5), file)[0] == "failed"
    assert judge(done(module, "", code=0), file)[:2] == ("failed", "no test ran; exit status 0: no output")
    file.write_text("<testsui")
    assert judge(done(module, "Killed", code=137), file).reason == "pytest left no report: exit status 137: Killed"


def test_judging_tests_of_several_processes(module, tmp_path: Path) -> None:
    judge, file = module("_suite.judge").tests, tmp_path / "junit.xml"
    assert judge(done(module, "Killed", code=137), file).reason == "pytest left no report: exit status 137: Killed"
    for share, text in enumerate((JUNIT.format(more=""), "<testsui", JUNIT.format(more=FAILED))):
        module("_suite.shares").report_of(file, share).write_text(text)
    assert judge(done(module, "", code=1), file)[:2] == ("failed", "4 passed, 1 failed, 2 skipped")


def test_several_processes_share_the_tests(module, tmp_path: Path) -> None:
    body = "import os, pytest\n@pytest.mark.parametrize('i', range(5))\ndef test_it(i):\n    assert i != {}\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    judge, report = module("_suite.judge").tests, tmp_path / "report.xml"
    # with a share of none, one that fails, and none that runs at all
    for processes, broken, status, counts in ((7, 9, 0, [5, 0]), (2, 3, 1, [4, 1])):
        (tmp_path / "test_a.py").write_text(body.format(broken))
        command = [sys.executable, "-m", "_suite.shares", str(processes), str(report), "-p", "no:cacheprovider", "."]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == status, ran.stdout
        found = judge(done(module, ran.stdout, code=ran.returncode), report).result["counts"]
        assert [found["passed"], found["failed"]] == counts
        for file in tmp_path.glob("report.*.xml"):
            file.unlink()
    assert subprocess.run([*command, "-k", "nothing"], cwd=tmp_path, env=environment).returncode == 5


def test_an_interrupt_leaves_the_reports_of_all_processes(module, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pathlib, pytest, time\n@pytest.mark.parametrize('i', range(4))\ndef test_it(i):\n"
        "    pathlib.Path(f'ran{i}').touch()\n    time.sleep(60 * (i > 1))\n"
    )
    run, report = module("_suite.process").run, tmp_path / "report.xml"
    options = ("-p", "no:cacheprovider", ".")
    command = (sys.executable, "-m", "_suite.shares", "2", str(report), *options)
    cut = run(command, 15, tmp_path, {"PYTHONPATH": str(ROOT / "benchmarks")})
    assert cut.timed_out and (tmp_path / "ran3").exists()
    assert module("_suite.judge").tests(cut, report).result["counts"]["passed"] >= 2  # JUnit also has the one cut off


@pytest.mark.parametrize(
    ("output", "code", "status", "reason"),
    [
        (
            "a PASSED [1]\nb PASSED\n========= ERROR SUMMARY: 0 errors\n",
            0,
            "ok",
            "2 tests passed; ERROR SUMMARY: 0 errors",
        ),
        ("========= ERROR SUMMARY: 3 errors\n", 99, "failed", "0 tests passed; ERROR SUMMARY: 3 errors"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, "ok", "0 tests passed; RACE"),
        ("========= RACECHECK SUMMARY: 10 hazards displayed (10 errors)\n", 0, "failed", "0 tests passed; RACECHECK"),
        ("a PASSED\n", 0, "failed", "1 tests passed; no summary"),
        ("a PASSED\nerror: x\n========= ERROR SUMMARY: 0 errors\n", 1, "failed", "1 tests passed; ERROR SUMMARY: 0"),
        (
            "========= Error: Device not supported.\n",
            255,
            "unavailable",
            "compute-sanitizer says: Device not supported",
        ),
        ("a PASSED\n", None, "failed", "ran out of its 12 s; until then 1 tests passed; no summary"),
    ],
)
def test_judging_the_sanitizer(module, output: str, code: int | None, status: str, reason: str) -> None:
    got = module("_suite.judge").sanitizer(done(module, output, code, timed_out=code is None))
    assert got.status == status and got.reason.startswith(reason)


NCU = """==PROF== Connected
scan fp32   0.1 s
"ID","Kernel Name","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum"
"","","%","ns"
"0","scan_kernel","81.5","12,345"
==PROF== Disconnected
"""


def test_judging_nsight_compute(module) -> None:
    judge = module("_suite.judge").ncu
    got = judge(done(module, NCU))
    assert got[:2] == ("ok", "Nsight Compute, 1 launches")
    (launch,) = got.result["launches"]
    assert (launch["kernel"], launch["ns"], launch["DRAM %"]) == ("scan_kernel", "12,345", "81.5")
    assert judge(done(module, "==ERROR== no permission", 1)).reason.endswith("exit status 1: ==ERROR== no permission")
    assert judge(done(module, NCU, code=1)).status == "failed"


def test_judging_a_trace(module) -> None:
    judge = module("_suite.judge").trace
    good = "parity\n\nfast-bfloat16, one run as timed and one by stages, in t:\n--- a\nkernel\n\nrow  median\nfast\n"
    found = judge(done(module, good))
    assert found.status == "ok" and found.result["text"].startswith("fast-bfloat16, one run as")
    assert "kernel" in found.result["text"] and "median" not in found.result["text"]
    assert judge(done(module, good, code=1)).status == "failed"
    assert judge(done(module, "row  median\n")).status == "failed"


NSYS = """Generating '/tmp/x.qdstrm'
row  median

 ** NVTX Range Summary (nvtx_sum):

 ** CUDA GPU Kernel Summary (cuda_gpu_kern_sum):

 99.0  1000  fused_linear
"""


def test_judging_nsight_systems(module) -> None:
    judge = module("_suite.judge").nsys
    found = judge(done(module, NSYS))
    assert (
        found.status == "ok" and found.result["text"].startswith(" ** NVTX") and "fused_linear" in found.result["text"]
    )
    assert judge(done(module, NSYS, code=1)).status == "failed"
    assert judge(done(module, "SKIPPED: no kernel data\n")).reason.startswith("no summary of kernels: ")


def test_judging_the_others(module) -> None:
    judge = module("_suite.judge")
    assert judge.warmup(done(module, "x\n3 kernels compiled, 0 from the cache, 1.0 s\n"))[:2] == (
        "ok",
        "3 kernels compiled, 0 from the cache, 1.0 s",
    )
    assert judge.warmup(done(module, "")).status == "failed"
    assert judge.resources(done(module, "5 variants, 0 of what ships\n"))[:2] == ("ok", "5 variants, 0 of what ships")
    assert judge.resources(done(module, "5 variants, 1 of what ships\n", 1)).status == "failed"


# ---- the steps


def plan(module, tmp_path: Path, **changes):
    facts = {"device": "cuda", "quick": False, "out": tmp_path, "scratch": tmp_path, "no_gpu": None}
    tools = {"ncu": "/bin/ncu", "nsys": "/bin/nsys", "compute-sanitizer": "/bin/compute-sanitizer"}
    return module("_suite.steps").Plan(**{**facts, "tools": tools, **changes})


def test_the_steps_of_a_gpu(module, tmp_path: Path) -> None:
    parts = module("_suite.parts")
    found = parts.steps(parts.PARTS, plan(module, tmp_path))
    assert [step.name for step in found if step.missing] == []
    names = [step.name for step in found]
    assert len(set(names)) == len(names) and [s.part for s in found] == sorted(
        (s.part for s in found), key=parts.PARTS.index
    )
    benchmarks = {path.stem for path in (ROOT / "benchmarks" / "kernels").glob("*.py")}
    wanted = {
        f"kernels {stem}"
        for stem in benchmarks
        if not stem.startswith("_") and stem not in ("cpu", "resources", "overhead")
    }
    assert {" ".join(name.split()[:2]) for name in names if name.startswith("kernels ")} == wanted
    assert "kernels denoise_step --rows 8192 --no-compile" in names
    for step in found:
        assert 0 < step.least <= step.limit
        for word in step.command:
            if word.startswith("benchmarks/"):
                assert (ROOT / word).exists(), word
    assert all("--device cuda" in " ".join(s.command) for s in found if s.part in ("kernels", "ceilings", "latency"))


def test_every_gpu_test_is_in_one_of_two_parts(module, tmp_path: Path) -> None:
    parts = module("_suite.parts")
    graphs, tests = (parts.steps((part,), plan(module, tmp_path))[0] for part in ("graphs", "tests"))
    files = [{word for word in step.command if word.startswith("tests/")} for step in (graphs, tests)]
    assert not files[0] & files[1] and "tests/sampling/test_fast_graphs.py" in files[0]
    assert "tests/ops/test_add_residual.py" in files[1] and "tests/test_cli.py" not in files[1]
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text()}
    assert files[0] | files[1] == {str(path.relative_to(ROOT)) for path in marked}
    assert "-n" not in graphs.command


def test_fast_rows_come_before_what_compiles_for_minutes(module, tmp_path: Path) -> None:
    parts = module("_suite.parts")
    found = {step.name: step for step in parts.steps(parts.GPU_PARTS, plan(module, tmp_path))}
    order = list(found)
    assert order.index("latency") < order.index("throughput") < order.index("graphs") < order.index("precision")
    assert order.index("precision") < order.index("baselines latency") < order.index("baselines throughput")
    for name, batch in (("latency", "1"), ("throughput", "16")):
        for step in (found[name], found[f"baselines {name}"]):
            command = " ".join(step.command)
            assert (
                f"benchmarks/{name}.py" in command and f"--bs {batch} " in command and "--preset dc-ar-512" in command
            )
            assert f"--weights {tmp_path / 'weights'}" in command  # drawn once
        eight = " fast-fp8" if name == "throughput" else ""
        assert f"--rows eager-float32 eager-bfloat16 fast-float32{eight} fast-bfloat16" in " ".join(found[name].command)
        compiled = " ".join(found[f"baselines {name}"].command)
        assert compiled.endswith("--rows fast-bfloat16 compile-bfloat16:max-autotune")


def test_the_profiles(module, tmp_path: Path) -> None:
    """The commands that the documentation gives."""
    parts = module("_suite.parts")
    trace, nsys, ranges, kernels = parts.steps(("profile",), plan(module, tmp_path))
    assert "--profile" in trace.command and "--rows fast-bfloat16" in " ".join(trace.command)
    collect, stats = nsys.command[-1].split(" && ")
    assert collect.startswith("/bin/nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop ")
    assert collect.endswith("--profile-range") and "--trace=cuda,nvtx" in collect
    assert stats.startswith("/bin/nsys stats --report ") and stats.endswith(f"{tmp_path / 'report'}.nsys-rep")
    assert " ".join(ranges.command).startswith("/bin/ncu --nvtx --profile-from-start off ")
    assert ranges.command[-1] == "--nvtx"
    assert "add_residual_kernel" in " ".join(kernels.command)


def test_tools_that_are_missing(module, tmp_path: Path) -> None:
    parts = module("_suite.parts")
    found = parts.steps(("sanitizer", "profile"), plan(module, tmp_path, tools={"ncu": None}))
    assert [step.missing for step in found[:2]] == ["compute-sanitizer is not installed"] * 2
    assert [step.missing for step in found[2:]] == [None, "nsys is not installed", "ncu is not installed", None]
    assert found[-1].command[1:] == ("-m", "_suite.profile")


def test_on_a_cpu_the_others_say_why(module, tmp_path: Path) -> None:
    parts = module("_suite.parts")
    found = parts.steps(parts.PARTS, plan(module, tmp_path, device="cpu", no_gpu="torch sees no GPU"))
    missing = {step.part: step.missing for step in found if step.name != "profile trace"}
    needs = {"warmup", "graphs", "tests", "sanitizer", "profile", "tune"}
    assert missing == {part: f"{NO_GPU}torch sees no GPU" if part in needs else None for part in parts.PARTS}
    assert not needs & set(parts.CPU_PARTS)


def test_small_sizes_are_for_benchmarks_that_exist(module) -> None:
    parts = module("_suite.parts")
    assert set(parts.SMALL) <= set(parts.kernel_benchmarks()) and set(parts.FULL) <= set(parts.kernel_benchmarks())


def test_a_few_tests_of_every_file(tmp_path: Path) -> None:
    for name, count in (("a", 7), ("b", 1)):
        body = f"import pytest\n@pytest.mark.parametrize('i', range({count}))\ndef test_it(i):\n    pass\n"
        (tmp_path / f"test_{name}.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-p", "_suite.subset", "-p", "no:cacheprovider", "-v", "."]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "SUITE_PER_FILE": "3", "PYTEST_ADDOPTS": ""}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    passed = [line.split()[0] for line in ran.stdout.splitlines() if " PASSED" in line]
    assert passed == [
        "test_a.py::test_it[0]",
        "test_a.py::test_it[2]",
        "test_a.py::test_it[4]",
        "test_b.py::test_it[0]",
    ]
    assert "4 deselected" in ran.stdout


# ---- the summary


def test_kernels_beside_the_ceilings(module) -> None:
    report = module("_suite.report")
    ceilings = {
        "copy_gb_per_s": {"median": 4000.0},
        "matmul_tflop_per_s": {"bfloat16": {"median": 800.0}, "float32": {"median": 50.0}, "tf32": None},
    }
    times = {"triton": 0.02, "cuda": 0.03, "reference": 0.5, "torch compile": 0.1}
    found = {"results": {name: {"median_ms": value} for name, value in times.items()}}
    rates = {"gb_per_s": {"triton": 3000.0, "cuda": 1.0}, "gflop_per_s": {"triton": 40000.0}, "dtype": "torch.float32"}
    row = report.kernel_row("op", found | rates, ceilings)
    assert row[:6] == ("op", "triton", "0.02", "torch compile", "0.1", "5.00")
    assert row[6] == "3000 GB/s, 75% of the ceiling; 4e+04 GFLOP/s, 80% of the ceiling"
    assert report.kernel_row("op", found | rates, None)[6] == "3000 GB/s; 4e+04 GFLOP/s"
    assert report.kernel_row("op", found | {"tflop_per_s": 400}, ceilings)[6] == "400 TFLOP/s, 50% of the ceiling"
    alone = report.kernel_row("op", {"results": {"reference": {"median_ms": 1.0}}}, ceilings)
    assert alone == ("op", "-", "-", "reference", "1", "-", "-")


RESULT = {"benchmark": "latency", "preset": "dc-ar-512", "batch": 1}
ROW = {"name": "fast-bfloat16", "median_s": 0.025, "images_per_s": 40.0, "first_s": 12.5}


def test_images_and_precision_in_the_summary(module) -> None:
    report = module("_suite.report")
    failed = {"name": "compile-bfloat16", "median_s": None, "unavailable": "no | compiler"}
    other = RESULT | {"rows": [ROW | {"first_s": None}, failed]}
    exact = {"name": "fast-float32", "step_agreement": [1.0, 0.5], "free_agreement": 0.9, "psnr_free": None}
    exact |= {"residual": {"relative": 1e-3}, "emulated": None}
    precision = {"rows": [exact, exact | {"name": "fast-fp8", "emulated": "sm_80 has no fp8"}]}
    records = [
        {"name": name, "part": name.split()[0], "status": "ok", "seconds": 1.0, "reason": "", "result": result}
        for name, result in (
            ("latency", RESULT | {"rows": [ROW]}),
            ("baselines latency", other),
            ("precision", precision),
            ("graphs", {"failures": [{"test": "tests.a::b", "message": "unequal"}]}),
            ("tests", {"failures": [{"test": "tests.c::d", "message": "bad"}]}),
        )
    ]
    page = report.markdown({"environment": None, "stopped": None}, records)
    what = "| latency, dc-ar-512, batch 1 |"
    assert page.count(f"{what} fast-bfloat16 | 25 ms | 40 |") == 2
    assert f"{what} fast-bfloat16 | 25 ms | 40 | 12.5 s |" in page
    assert f"{what} compile-bfloat16 | unavailable: no / compiler | - | - |" in page
    assert "| fast-float32 | 75.00% | 90.00% | 1.00e-03 | equal |" in page
    assert "| fast-fp8 (emulated) | 75.00% |" in page
    assert "- `tests.a::b`: unequal" in page and "- `tests.c::d`: bad" in page


def test_the_profiles_share_a_file(module, tmp_path: Path) -> None:
    report = module("_suite.report")
    records = [
        {"name": f"profile {name}", "part": "profile", "status": status, "seconds": 1.0, "reason": "", "result": result}
        for name, status, result in (
            ("trace", "ok", {"text": "operations"}),
            ("nsys", "unavailable", None),
            ("kernels", "ok", {"text": "launches", "launches": []}),
        )
    ]
    report.write(tmp_path, {"environment": None, "stopped": None}, records, {})
    assert (tmp_path / "profile.txt").read_text() == "===== profile trace\noperations\n===== profile kernels\nlaunches"
    assert len(list(tmp_path.iterdir())) <= 8


# ---- ceilings.py


def test_ceilings_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ceilings.py"), "--quick", "--device", "cpu"]
    ran = subprocess.run([*command, "--json", str(tmp_path / "c.json")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    line = json.loads(ran.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "c.json").read_text()) == line
    for found in (line["copy_gb_per_s"], *line["matmul_tflop_per_s"].values()):
        assert 0 < found["p20"] <= found["median"] <= found["p80"]
    assert line["unavailable"] == {} and set(line["matmul_tflop_per_s"]) == {"bfloat16", "float32"}


def test_rates(module) -> None:
    assert module("ceilings").rate(10.0, [5.0, 1.0, 2.0, 2.5, 4.0]) == pytest.approx(
        {"median": 4.0, "p20": 10 / 4.2, "p80": 10 / 1.8}
    )


def test_a_ceiling_that_cannot_be_measured(module, monkeypatch) -> None:
    ceilings = module("ceilings")

    def product(device: str, kind: str, side: int) -> dict[str, float]:
        if kind == "bfloat16":
            raise RuntimeError("no such product\nmore")
        return {"median": 1.0}

    monkeypatch.setattr(ceilings, "product", product)
    found = ceilings.measure("cpu", quick=True)
    assert found["unavailable"] == {"bfloat16": "no such product"}
    assert found["matmul_tflop_per_s"] == {"bfloat16": None, "float32": {"median": 1.0}}
