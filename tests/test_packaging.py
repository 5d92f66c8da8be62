"""What pip makes of a checkout: the wheel's contents, and an installation that works from anywhere.

One build without CUDA, in a copy of the tree, with the build tools of this environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "dcar_fast", "kernels", "csrc")


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``pip wheel`` of a copy of the checkout in ``folder``, into folder/dist; ``environment`` is added to ours."""
    tree = folder / "tree"
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy(source, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    return subprocess.run(
        [*command, "-w", str(folder / "dist"), str(tree)],
        env={**os.environ, "DCAR_FAST_CUDA": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def extract(folder: Path) -> Path:
    """Unpacks the one wheel in folder/dist, as an installation would."""
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


# An editable install of this environment would supply from the checkout whatever the wheel lacks.
NO_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)];"


def run_in(site: Path, code: str, cwd: Path) -> str:
    """Runs Python with ``site`` in front of its path, away from the checkout."""
    command = [sys.executable, "-c", NO_EDITABLE + code]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The unpacked wheel and the build's output."""
    folder = tmp_path_factory.mktemp("wheel")
    done = build(folder)
    assert done.returncode == 0, done.stdout
    return extract(folder), done.stdout


def test_wheel_holds_the_package(wheel: tuple[Path, str]) -> None:
    site, _ = wheel
    here = {path.relative_to(ROOT) for path in (ROOT / "dcar_fast").rglob("*.py")}
    here |= {Path("dcar_fast", path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")}
    here |= {Path("dcar_fast", path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("tuned/*.json")}
    here |= {
        path.relative_to(ROOT)
        for kind in ("py.typed", "*.yaml", "*.json", "*.safetensors")
        for path in (ROOT / "dcar_fast").rglob(kind)
    }
    packed = {path.relative_to(site) for path in (site / "dcar_fast").rglob("*") if path.is_file()}
    assert {path for path in packed if path.suffix != ".so"} == here
    assert Path("dcar_fast/py.typed") in packed
    assert sorted(path.name for path in site.iterdir() if not path.name.endswith(".dist-info")) == ["dcar_fast"]
    assert not list((site / "dcar_fast" / "kernels").glob("__init__.py"))


def test_wheel_describes_itself(wheel: tuple[Path, str]) -> None:
    site, _ = wheel
    (info,) = site.glob("*.dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    version = run_in(site, "import dcar_fast; print(dcar_fast.__version__)", site)
    assert f"\nVersion: {version}\n" in metadata
    assert "\nLicense: Apache-2.0\n" in metadata
    assert "\nRequires-Dist: torch>=2.9\n" in metadata, "an installed torch must not be replaced"
    assert "dcar-fast = dcar_fast.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")


def test_wheel_works_outside_the_checkout(wheel: tuple[Path, str], tmp_path: Path) -> None:
    site, _ = wheel
    assert run_in(site, "import dcar_fast.kernels as k; print(*k.__path__)", tmp_path) == str(
        site / "dcar_fast/kernels"
    )
    code = (
        "import torch; from dcar_fast import ops; print(ops.vq_lookup(torch.eye(3), torch.eye(3).flip(0))[0].tolist())"
    )
    assert run_in(site, code, tmp_path) == "[2, 1, 0]"


def test_native_module_was_built_without_cuda(wheel: tuple[Path, str], tmp_path: Path) -> None:
    site, output = wheel
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")):
        pytest.skip("there is no C++ compiler")
    assert "dcar_fast: building CPU kernels only, CUDA is left out: DCAR_FAST_CUDA=0 at build time" in output
    code = "import torch, dcar_fast._native as n; print(n.cuda_compiled(), n.cuda_archs(), n.cuda_left_out())"
    assert run_in(site, code, tmp_path) == "False [] DCAR_FAST_CUDA=0 at build time"


def test_without_a_compiler_the_install_is_pure_python(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = build(tmp_path, PATH=str(tmp_path / "bin"), CXX="")
    assert done.returncode == 0, done.stdout
    assert "dcar_fast: WARNING: installing without the native module" in done.stdout
    assert "no C++ compiler" in done.stdout
    site = extract(tmp_path)
    assert not list(site.rglob("*.so"))
    code = "from dcar_fast import ops; print(ops.report('cpu')['vq_lookup']['native'].reason)"
    assert run_in(site, code, tmp_path).startswith("dcar_fast._native was not built")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "/nowhere/c++"}, "CXX=/nowhere/c++: there is no such command"),
        ({"CXX": "false"}, "the native module did not build"),
        ({"DCAR_FAST_CUDA": "yes"}, "DCAR_FAST_CUDA=yes: allowed are 0 and 1"),
    ],
)
def test_what_goes_wrong_fails_the_build(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    done = build(tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stdout, done.stdout
