"""The example scripts, on stand-ins for the other codebases, and without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = """
from tests.integrations.mar_family import {kind} as Head

class DiffLoss(Head):
    def __init__(self, **given):
        sizes = dict(target_channels=4, depth=1, width=32, z_channels=given["z_channels"])
        super().__init__(**sizes, num_sampling_steps="6")
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def write(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("script", "file", "kind"),
    [
        ("patch_mar.py", "models/diffloss.py", "MarDiffLoss"),
        ("patch_hart.py", "hart/modules/diffusion/diffloss.py", "HartDiffLoss"),
    ],
)
def test_heads(script, file, kind, tmp_path):
    write(tmp_path, file, SMALL.format(kind=kind))
    done = run(script, "--repo", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sample runs on packed matrix products" in done.stdout
    assert float(done.stdout.split()[-1]) < 1e-4


@pytest.mark.parametrize("script", ["patch_mar.py", "patch_hart.py", "patch_maskgen.py"])
def test_without_the_other_codebase(script, tmp_path):
    done = run(script, "--repo", tmp_path)
    assert done.returncode == 1 and "give --repo the checkout of the other codebase" in done.stderr
    files = ("models/diffloss.py", "hart/modules/diffusion/diffloss.py", "modeling/modules/losses.py")
    for file in files:
        write(tmp_path, file, "import no_such_module_here\n")
    done = run(script, "--repo", tmp_path)
    assert done.returncode == 1 and "the other codebase cannot be imported here" in done.stderr


def test_the_released_generator_needs_its_checkout(tmp_path):
    done = run("accelerate_dcar.py", "--repo", tmp_path, "--generator", "x.bin", "a prompt")
    assert done.returncode == 1 and "holds no modeling/generator/dc_ar.py" in done.stderr


def test_diffusers(tmp_path):
    write(tmp_path, "diffusers.py", "raise ImportError('not here')\n")
    command = [sys.executable, str(ROOT / "examples" / "accelerate_autoencoder.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1 and "diffusers cannot be imported here: not here" in done.stderr
