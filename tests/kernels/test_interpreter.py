"""Runs the Triton kernels on CPU tensors, in Triton's interpreter: one process for each file in interpreted/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = sorted((HERE / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
    if version < (3, 7):
        pytest.skip(f"the interpreter of triton {triton.__version__} does not work with recent numpy")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run(
        [*command, str(file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), f"not every case ran:\n{done.stdout}"


def test_every_kernel_is_interpreted() -> None:
    from dcar_fast.kernels.offline import kernel_names

    assert {file.stem for file in FILES} == {f"test_{name}" for name in (*kernel_names(), "philox")}
