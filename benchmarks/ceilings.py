"""What this device can do at best: bytes per second of a large copy, and operations per second of matrix products.

    python benchmarks/ceilings.py [--device cuda] [--quick] [--json FILE]

Every other number is judged against these, so measure them in the same session. The copy counts the bytes read and
the bytes written, in buffers far larger than the caches. The products are square, through PyTorch, on random numbers:
zeros run faster. The median of the timed runs counts. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from _arguments import Parser, check_device, check_output
from _report import commit, environment, percentile, table

# bytes of one copied buffer, and the side of the matrices; quick ones only show that the command works
SIZES = {"cuda": (2 << 30, 8192), "cpu": (512 << 20, 2048), "quick": (16 << 20, 256)}
DTYPES = {"cuda": ("bfloat16", "float16", "tf32", "float32"), "cpu": ("bfloat16", "float32")}
ROUNDS = 10


def seconds(call: Callable[[], object], device: str, rounds: int) -> list[float]:
    """The time of each of ``rounds`` calls after two that do not count; on a GPU between events."""
    import torch

    call(), call()
    if device == "cpu":
        found = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def rate(work: float, times: list[float]) -> dict[str, float]:
    """``work`` per second, by the median, and by the slower and faster fifth of the runs."""
    return {name: work / percentile(times, share) for name, share in (("median", 0.5), ("p20", 0.8), ("p80", 0.2))}


def copy(device: str, size: int) -> dict[str, float]:
    """Gigabytes per second, read plus written."""
    import torch

    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return rate(2 * size / 1e9, seconds(lambda: target.copy_(source), device, ROUNDS))


def product(device: str, kind: str, side: int) -> dict[str, float]:
    """TFLOP/s of ``kind``: a dtype, or "tf32" for float32 on tensor cores."""
    import torch

    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with matmul_precision("high" if kind == "tf32" else "highest"):
        return rate(2 * side**3 / 1e12, seconds(lambda: torch.mm(a, b, out=out), device, ROUNDS))


@contextlib.contextmanager
def matmul_precision(name: str):
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(device: str, quick: bool) -> dict[str, Any]:
    """The JSON line's content; what cannot be measured is None, with the reason under "unavailable"."""
    import torch

    kind = "cpu" if device == "cpu" else "cuda"
    size, side = SIZES["quick" if quick else kind]
    unavailable: dict[str, str] = {}

    def attempt(name: str, call: Callable[..., dict[str, float]], *args: Any) -> dict[str, float] | None:
        try:
            return call(device, *args)
        except RuntimeError as error:  # no memory, or no such product on this device
            unavailable[name] = str(error).partition("\n")[0]
            return None

    copied = attempt("copy", copy, size)
    products = {name: attempt(name, product, name, side) for name in DTYPES[kind]}
    return {
        "benchmark": "ceilings",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "hardware": torch.cuda.get_device_name(device) if kind == "cuda" else None,
        "threads": torch.get_num_threads(),
        "copy_bytes": size,
        "matrix_side": side,
        "copy_gb_per_s": copied,
        "matmul_tflop_per_s": products,
        "unavailable": unavailable,
        "versions": environment(device),
        "commit": commit(),
    }


def main() -> int:
    parser = Parser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON line to this file")
    arguments = parser.parse_args()
    check_output(parser, "--json", arguments.json)
    import torch

    torch.manual_seed(0)
    device = check_device(parser, arguments.device)
    if device != "cpu":
        torch.cuda.set_device(device)
    result = measure(device, arguments.quick)
    lines = [(f"copy of {result['copy_bytes'] >> 20} MiB", *cells(result["copy_gb_per_s"]), "GB/s")]
    for name, found in result["matmul_tflop_per_s"].items():
        lines.append((f"{name} product of side {result['matrix_side']}", *cells(found), "TFLOP/s"))
    print(table(("ceiling", "median", "p20", "p80", "unit"), lines))
    for name, reason in result["unavailable"].items():
        print(f"not measured: {name}: {reason}")
    line = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)
    return 0


def cells(found: dict[str, float] | None) -> list[str]:
    return [f"{value:.4g}" for value in found.values()] if found else ["-"] * 3


if __name__ == "__main__":
    sys.exit(main())
