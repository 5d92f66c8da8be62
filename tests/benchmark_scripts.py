"""Runs the scripts of benchmarks/ for their tests, and imports their modules."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script, *arguments, **environment) -> subprocess.CompletedProcess:
    """One thread: several would wait for each other on a machine that does something else as well."""
    command = [sys.executable, str(script if isinstance(script, Path) else BENCHMARKS / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(name="module")
def import_module(monkeypatch):
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
