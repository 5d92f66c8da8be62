"""gelu against PyTorch: every usable backend, and the tanh-approximated F.gelu eager and compiled.

    python benchmarks/kernels/gelu.py [--rows 512 --width 4608] [--dtype float32] [--rounds 50] [--device cpu]

The default is the hidden layer of the full-size model's MLP for one image. First every implementation must be as close
to float64 as PyTorch is; then they are timed in turns. Ends with one JSON line. On a GPU the activation belongs into
the product before it, so that nothing but PyTorch's own kernel runs there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _compare import interleave, print_results, summary  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.ops import gelu, report
from dcar_fast.ops._dispatch import BACKENDS

Gelu = Callable[[Tensor], Tensor]


def by_torch(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def implementations(device: str, compiled: bool) -> dict[str, Gelu]:
    """Name -> function; for what cannot run here the reason is printed."""
    found: dict[str, Gelu] = {}
    for name, (usable, reason) in report(device)["gelu"].items():
        if usable:
            found[name] = lambda x, name=name: gelu(x, backend=name)
        else:
            print(f"not measured: {name}: {reason}")
    found["torch eager"] = by_torch
    if compiled:
        found["torch.compile"] = torch.compile(by_torch, dynamic=False)
    else:
        print("not measured: torch.compile: --no-compile")
    return found


def check_parity(candidates: dict[str, Gelu], x: Tensor) -> None:
    """SystemExit unless each errs at most twice as far from float64 as PyTorch, plus the rounding of the result."""
    truth = by_torch(x.double())
    baseline, rounding = ((value.double() - truth).abs().max().item() for value in (by_torch(x), truth.to(x.dtype)))
    for name, run in candidates.items():
        error = (run(x).double() - truth).abs().max().item()
        print(f"parity {name}: error {error:.3g}, allowed 2 x {baseline:.3g} + {rounding:.3g}")
        if not error <= 2 * baseline + rounding:
            sys.exit(f"error: {name} is wrong, nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=4608, help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all alike (torch's default)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    arguments = parser.parse_args()
    for name in ("rows", "width", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    device = arguments.device
    x = torch.randn(arguments.rows, arguments.width, device=device).to(getattr(torch, arguments.dtype))
    candidates = implementations(device, not arguments.no_compile)
    check_parity(candidates, x)
    calls = {name: (lambda run=run: run(x)) for name, run in candidates.items()}
    results = summary(interleave(calls, arguments.rounds, device))

    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "gb_per_s": {name: 2 * x.nbytes / result["median_ms"] / 1e6 for name, result in results.items()},
    }
    shape = {name: getattr(arguments, name) for name in ("rows", "width", "dtype", "rounds")}
    print_results("gelu", device, shape, results, **more)


if __name__ == "__main__":
    main()
