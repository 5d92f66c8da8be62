"""Imports point one way: config, noise <- reference <- models, and kernels, csrc <- ops <- engine, and both below
sampling, pipeline, training and the command line.

The imports are read from the source with ast, also those inside functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Parts of dcar_fast below the applications, and what of dcar_fast each of them may import besides itself.
BASE = {"config", "noise", "profiling", "_files"}
LAYERS: dict[str, set[str]] = {
    "config": set(),
    "noise": {"config"},
    "profiling": set(),
    "_files": set(),
    "reference": BASE,
    "models": BASE | {"reference"},
    "kernels": set(),
    "ops": BASE | {"reference", "kernels", "_native"},
    "engine": BASE | {"reference", "models", "kernels", "ops", "_native"},
    "sampling": BASE | {"reference", "models", "ops", "engine"},
}
# What people use: may import everything but the command line.
APPLICATIONS = {
    "_inputs",
    "_model_choice",
    "_sampling_options",
    "_progress",
    "_release",
    "_stages",
    "bulk",
    "checkpoints",
    "cli",
    "doctor",
    "evaluation",
    "fast_flops",
    "flops",
    "images",
    "integrations",
    "pipeline",
    "training",
    "timing",
    "tuning",
}
# Packages from outside that belong to one layer only.
KERNEL_PACKAGES = {"torch", "triton"}
ONLY_IN = {"triton": {"kernels"}, "tyro": {"cli"}}


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(module name, file) of the package and of kernels/, which is imported as dcar_fast.kernels."""
    for folder, package in ((root / "dcar_fast", "dcar_fast"), (root / "kernels", "dcar_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def imports(module: str, path: Path) -> Iterator[str]:
    """Absolute names of everything ``path`` imports; ``from a import b`` gives a.b, relative imports are resolved."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def layer(name: str, public: dict[str, str]) -> str | None:
    """The part of dcar_fast that an imported name belongs to; None for dcar_fast itself and its version."""
    name = public.get(name, name)
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and not parts[1].startswith("__") else None


def public_names(root: Path) -> dict[str, str]:
    """dcar_fast.Name -> the module that the package's lazy table takes it from."""
    for node in ast.parse((root / "dcar_fast" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "_PUBLIC":
            return {f"dcar_fast.{name}": module for name, module in ast.literal_eval(node.value).items()}
    raise AssertionError("dcar_fast/__init__.py has no table _PUBLIC")


def violations(root: Path) -> list[str]:
    """Every import that breaks the rules, as "module imports name: why"."""
    public = public_names(root)
    found = []
    for module, path in sources(root):
        here = layer(module, {})
        if here is None:
            continue  # dcar_fast/__init__.py names everything
        if here not in LAYERS and here not in APPLICATIONS:
            found.append(f"{module}: give {here!r} a place in LAYERS or APPLICATIONS")
            continue
        for name in imports(module, path):
            top = name.split(".")[0]
            if top == "dcar_fast":
                there = layer(name, public)
                if there is None or there == here:
                    continue
                if there == "cli":
                    found.append(f"{module} imports {name}: the command line is above everything")
                elif here in LAYERS and there not in LAYERS[here]:
                    found.append(f"{module} imports {name}: {here} may import {sorted(LAYERS[here]) or 'nothing'}")
            elif here == "kernels" and top not in KERNEL_PACKAGES | sys.stdlib_module_names:
                found.append(f"{module} imports {name}: kernels may import {sorted(KERNEL_PACKAGES)}")
            elif here not in ONLY_IN.get(top, {here}):
                found.append(f"{module} imports {name}: only {sorted(ONLY_IN[top])} may")
    return found


def torch_headers(root: Path) -> list[str]:
    """Files of csrc/ that include a header of torch."""
    pattern = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10|caffe2)/", re.MULTILINE)
    files = [path for path in sorted((root / "csrc").rglob("*")) if path.is_file()]
    assert files, "csrc/ is empty"
    return [path.name for path in files if pattern.search(path.read_text(encoding="utf-8"))]


def test_imports_point_one_way() -> None:
    assert violations(ROOT) == []


def test_csrc_includes_no_torch_header() -> None:
    assert torch_headers(ROOT) == []


def test_one_op_one_name() -> None:
    """ops/x.py has reference/x.py and tests/ops/test_x.py; a kernel has an op of its name."""

    def names(folder: str, suffix: str) -> set[str]:
        return {path.stem for path in (ROOT / folder).glob(f"*{suffix}") if not path.stem.startswith("_")}

    ops = names("dcar_fast/ops", ".py")
    assert ops, "there are ops"
    assert ops <= names("dcar_fast/reference", ".py")
    assert {f"test_{op}" for op in ops} <= names("tests/ops", ".py")
    assert names("kernels", ".py") - {"configs", "offline", "philox"} <= ops
    assert names("csrc", ".cu") - {"cuda_version", "philox"} <= ops


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package that keeps the rules."""
    files = {
        "dcar_fast/__init__.py": '_PUBLIC = {"DCAR": "dcar_fast.models.dcar", "ops": "dcar_fast.ops"}\n',
        "dcar_fast/config.py": "import math\n",
        "dcar_fast/noise.py": "import torch\nfrom dcar_fast.config import X\n",
        "dcar_fast/reference/remask.py": "from dcar_fast.noise import TokenNoise\n",
        "dcar_fast/models/dcar.py": "from dcar_fast.reference.remask import remask\nfrom . import quantizer\n",
        "dcar_fast/models/quantizer.py": "from ..config import X\n",
        "dcar_fast/ops/remask.py": "def f():\n    from dcar_fast.kernels.remask import remask\n",
        "dcar_fast/sampling/fast.py": "from dcar_fast import DCAR, ops, __version__\n",
        "dcar_fast/cli.py": "import tyro\nfrom dcar_fast.sampling import fast\n",
        "kernels/remask.py": "import torch, triton\nimport triton.language as tl\nimport math\n",
        "csrc/remask.cpp": "#include <cstdint>\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_sound_tree_passes(tree: Path) -> None:
    assert violations(tree) == [] and torch_headers(tree) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("dcar_fast/config.py", "from dcar_fast.noise import Noise"),
        ("dcar_fast/noise.py", "import dcar_fast.reference.remask"),
        ("dcar_fast/reference/remask.py", "from dcar_fast.models.dcar import DCAR"),
        ("dcar_fast/reference/remask.py", "from ..models import dcar"),
        ("dcar_fast/models/dcar.py", "from dcar_fast.ops import remask"),
        ("dcar_fast/models/dcar.py", "from dcar_fast import ops"),
        ("dcar_fast/models/dcar.py", "def f():\n    from dcar_fast.sampling import fast"),
        ("dcar_fast/models/dcar.py", "import triton"),
        ("dcar_fast/ops/remask.py", "from dcar_fast import DCAR"),
        ("dcar_fast/ops/remask.py", "import triton.language"),
        ("dcar_fast/sampling/fast.py", "from dcar_fast.pipeline import DCARPipeline"),
        ("dcar_fast/sampling/fast.py", "import tyro"),
        ("dcar_fast/sampling/fast.py", "from dcar_fast.cli import main"),
        ("dcar_fast/pipeline.py", "from dcar_fast.cli import main"),
        ("kernels/remask.py", "import numpy"),
        ("kernels/remask.py", "from dcar_fast.config import X"),
        ("dcar_fast/novelty.py", "import math"),
    ],
)
def test_a_broken_rule_is_found(tree: Path, file: str, line: str) -> None:
    with (tree / file).open("a") as stream:
        stream.write(line + "\n")
    assert len(violations(tree)) == 1


@pytest.mark.parametrize("include", ["<torch/extension.h>", '"ATen/ATen.h"', "<c10/util/Half.h>"])
def test_a_torch_header_is_found(tree: Path, include: str) -> None:
    (tree / "csrc" / "bad.cu").write_text(f"#  include {include}\n")
    assert torch_headers(tree) == ["bad.cu"]
