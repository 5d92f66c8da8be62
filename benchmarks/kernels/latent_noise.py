"""latent_noise against PyTorch: every usable backend, the reference eager and compiled, and torch.randn.

    python benchmarks/kernels/latent_noise.py [--rows 256 --channels 32] [--rounds 100] [--device cpu]

First every implementation must give the reference's normals up to rounding; then they are timed in turns. Ends with one
JSON line. torch.randn draws other numbers, from one generator for the whole batch: it is what reproducible images cost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from _compare import interleave, print_results, summary  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.ops import latent_noise, report
from dcar_fast.ops._dispatch import BACKENDS
from dcar_fast.reference.latent_noise import latent_noise as reference

Draw = Callable[[Tensor, Tensor, int], Tensor]
CLOSE = 1e-5  # normals are at most 5.7; a wrong word would be off by about 1


def implementations(device: str, compiled: bool) -> dict[str, Draw]:
    """Name -> function of (seeds, tokens, channels); for what cannot run here the reason is printed."""
    found: dict[str, Draw] = {}
    for name, (usable, reason) in report(device)["latent_noise"].items():
        if usable:
            found[name] = lambda *rows, name=name: latent_noise(*rows, 3, initial=False, backend=name)
        else:
            print(f"not measured: {name}: {reason}")
    found["torch eager"] = lambda *rows: reference(*rows, 3, initial=False)
    if compiled:
        compile_ = torch.compile(reference, dynamic=False)
        found["torch.compile(reference)"] = lambda *rows: compile_(*rows, 3, initial=False)
    else:
        print("not measured: torch.compile: --no-compile")
    return found


def check_parity(candidates: dict[str, Draw], seeds: Tensor, tokens: Tensor, channels: int) -> None:
    """SystemExit unless each gives the reference's numbers."""
    want = reference(seeds, tokens, channels, 3, initial=False)
    for name, run in candidates.items():
        error = (run(seeds, tokens, channels) - want).abs().max().item()
        print(f"parity {name}: largest difference {error:.3g}, allowed {CLOSE:g}")
        if not error <= CLOSE:
            sys.exit(f"error: {name} is wrong, nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--channels", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all alike (torch's default)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    arguments = parser.parse_args()
    for name in ("rows", "channels", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    rows, channels, device = arguments.rows, arguments.channels, arguments.device
    position = torch.arange(rows, device=device)
    seeds, tokens = position // 256, position % 256
    candidates = implementations(device, not arguments.no_compile)
    check_parity(candidates, seeds, tokens, channels)
    calls = {name: (lambda run=run: run(seeds, tokens, channels)) for name, run in candidates.items()}
    calls["torch.randn (other numbers)"] = lambda: torch.randn(rows, channels, device=device)
    results = summary(interleave(calls, arguments.rounds, device))

    same = [name for name in results if name.startswith("torch") and "other numbers" not in name]
    torch_best = min(same, key=lambda n: results[n]["median_ms"])
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "gb_per_s": {name: 4 * rows * channels / result["median_ms"] / 1e6 for name, result in results.items()},
    }
    shape = {name: getattr(arguments, name) for name in ("rows", "channels", "rounds")}
    print_results("latent_noise", device, shape, results, **more)


if __name__ == "__main__":
    main()
