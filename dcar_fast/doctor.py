"""What is installed here, and for every op and backend whether it will be used and why not."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import dcar_fast
from dcar_fast import ops
from dcar_fast._inputs import check_device
from dcar_fast.ops._dispatch import ENVIRONMENT, choose, requested

PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "huggingface_hub", "nvtx", "flash-attn")


def report(device: str = "auto") -> str:
    """The text of ``dcar-fast doctor``; "auto" is a GPU if there is one, ValueError for a device that is missing."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = check_device(device)
    lines = [f"dcar_fast {dcar_fast.__version__}, Python {sys.version.split()[0]}, {platform.platform()}"]
    lines += [f"  {name:<16} {_version(name)}" for name in PACKAGES]
    lines += ["", f"device {target}: {_describe(target)}", f"{ENVIRONMENT}={requested()}"]
    for op, backends in ops.report(target).items():
        try:
            used = choose(op, target).name
        except ValueError as error:
            used = None
            lines += ["", f"{op}: {error}"]
        else:
            lines += ["", op]
        for name, (usable, reason) in backends.items():
            state = "used" if name == used else "ready" if usable else "no"
            lines.append(f"  {name:<10} {state:<6} {reason}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
