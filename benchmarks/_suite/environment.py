"""Prints one JSON line that says where the suite runs: GPU, driver, clocks, versions, commit, date."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import _report  # makes dcar_fast importable

CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
QUERY = ("driver_version", *CLOCKS, "power.limit", "temperature.gpu")
TOOLS = ("nvidia-smi", "nvcc", "compute-sanitizer", "ncu", "nsys")


def main() -> None:
    import torch

    wanted, commit = sys.argv[1:]
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _report.commit(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "python": sys.executable,
        "tools": {name: find(name) for name in TOOLS},
    }
    if wanted == "cpu":
        reason = "--device cpu"
    elif torch.cuda.is_available():
        reason = None
    else:
        reason = f"torch {torch.__version__} sees no GPU"
    found["device"], found["no_gpu"] = ("cuda" if reason is None else "cpu"), reason
    found["versions"] = _report.environment(found["device"])
    if reason is None:
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "nvidia_smi": nvidia_smi(),
        }
    found["name"] = slug(found["gpu"]["name"] if reason is None else f"cpu {found['cpu']}")
    print(json.dumps(found))


def nvidia_smi() -> dict[str, str] | None:
    """What the driver says of the first GPU; None where there is no nvidia-smi."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(QUERY, map(str.strip, done.stdout.split(",")), strict=False))


def find(tool: str) -> str | None:
    """A tool on PATH or in the CUDA toolkit."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [Path(home, part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(map(str, folders)))


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
