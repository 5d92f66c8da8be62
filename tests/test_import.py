"""What importing dcar_fast costs: nothing that was not asked for. Each case is a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOADED = "sorted({'torch', 'triton', 'transformers'} & {name.split('.')[0] for name in sys.modules})"


def run(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_package_alone_loads_nothing() -> None:
    assert run(f"import sys, dcar_fast; print({LOADED})") == "[]"


def test_package_adds_little_to_torch() -> None:
    code = "import time, torch; start = time.perf_counter(); import dcar_fast; print(time.perf_counter() - start)"
    assert float(run(code)) < 1.5


def test_names_load_torch_at_most() -> None:
    code = f"""
import sys, dcar_fast
for name in ("DCAR", "DCHT", "DCARConfig", "SamplingConfig", "CounterNoise", "ReferenceSampler", "ops"):
    getattr(dcar_fast, name)
    print(name, {LOADED})
import torch
print(torch.cuda.is_initialized())
"""
    *names, cuda = run(code).splitlines()
    assert [line.split(maxsplit=1)[1] for line in names] == ["['torch']"] * 7, names
    assert cuda == "False"


def test_every_public_name_is_there() -> None:
    code = """
import dcar_fast
assert set(dcar_fast.__all__) <= set(dir(dcar_fast))
print([name for name in dcar_fast.__all__ if getattr(dcar_fast, name, None) is None])
"""
    assert run(code) == "[]"


def test_unknown_names_are_attribute_errors() -> None:
    code = """
import dcar_fast
try:
    dcar_fast.no_such_name
except AttributeError as error:
    print(error)
"""
    assert run(code) == "module 'dcar_fast' has no attribute 'no_such_name'"


def test_kernels_of_a_checkout() -> None:
    """kernels/ lies beside the package in a checkout, without __init__.py, and is importable as dcar_fast.kernels."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = "import dcar_fast.kernels.add_residual as m; print(m.__name__, m.__file__)"
    name, file = run(code).split()
    assert name == "dcar_fast.kernels.add_residual"
    assert Path(file) == ROOT / "kernels" / "add_residual.py"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_checkout_hides_no_other_package_named_kernels(tmp_path: Path) -> None:
    """Even in the checkout's own folder, ``import kernels`` finds a regular package elsewhere on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    assert run(f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.__file__)") == str(
        tmp_path / "kernels" / "__init__.py"
    )
