"""The tests that need a GPU, in two parts: what captures and replays, and the rest."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from _report import ROOT

from _suite import judge
from _suite.steps import PYTHON, Plan, Step, gpu_needed

GRAPHS = ("tests/engine", "tests/sampling")
PROCESSES = max(1, min(12, (os.cpu_count() or 1) - 2))


def graphs(plan: Plan) -> list[Step]:
    """The samplers and the engine: buckets, replays, launches, precision. In one process: captures of several would
    share the GPU's memory."""
    return [pytest(plan, "graphs", gpu_tests(*GRAPHS), processes=1, limit=200)]


def tests(plan: Plan) -> list[Step]:
    """All others, in several processes: compiling takes the time."""
    others = [path for path in gpu_tests("tests") if not path.startswith(GRAPHS)]
    return [pytest(plan, "tests", others, processes=PROCESSES, limit=200)]


def pytest(plan: Plan, name: str, files: list[str], processes: int, limit: float) -> Step:
    report = plan.scratch / f"{name}.xml"
    options = ["-m", "gpu", "-q", "-rfE", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if processes > 1:
        command = [PYTHON, "-m", "_suite.shares", str(processes), str(report), *options]
    else:
        command = [PYTHON, "-m", "pytest", *options, f"--junitxml={report}"]
    missing = gpu_needed(plan) or (None if files else "there are no such tests")
    judgement = partial(judge.tests, report=report)
    return Step(name, name, (*command, *files), judgement, limit=limit, least=40, missing=missing)


def gpu_tests(*folders: str) -> list[str]:
    """The test files that mark a test for the GPU. Those without may need packages that a GPU machine lacks, so they
    are not even collected."""
    found = [path for folder in folders for path in sorted(Path(ROOT, folder).rglob("test_*.py"))]
    marked = [path for path in found if "@pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    return [str(path.relative_to(ROOT)) for path in marked]
