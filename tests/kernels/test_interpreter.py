"""Runs the Triton kernels on CPU tensors, in Triton's interpreter: one process for each file in interpreted/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = sorted((HERE / "interpreted").glob("test_*.py"))


def run(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    return subprocess.run(
        [*command, str(file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future]]:
    """The files that were asked for, as many at a time as there are cores."""
    version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
    if version < (3, 7):
        pytest.skip(f"the interpreter of triton {triton.__version__} does not work with recent numpy")
    wanted = [
        item.callspec.params["file"]
        for item in request.session.items
        if item.path == Path(__file__) and "runs" in item.fixturenames
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, file) for file in wanted}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path, runs: dict[Path, Future]) -> None:
    done = runs[file].result()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in", done.stdout, re.M), f"not every case ran:\n{done.stdout}"


def test_every_kernel_is_interpreted() -> None:
    from dcar_fast.kernels.offline import kernel_names

    assert {file.stem for file in FILES} == {f"test_{name}" for name in (*kernel_names(), "philox", "fast_sampler")}
