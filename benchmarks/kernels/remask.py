"""remask against PyTorch: every usable backend, the reference eager and compiled, and a threshold from torch.sort.

    python benchmarks/kernels/remask.py [--rows 16 --tokens 256] [--dtype float32] [--rounds 200] [--device cpu]

First every implementation must give the very same tokens; then they are timed in turns. Ends with one JSON line. The
threshold is what samplers usually do; it is right only while no two confidences of a row are equal, as here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from _compare import interleave, print_results, summary  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.ops import remask, report
from dcar_fast.ops._dispatch import BACKENDS
from dcar_fast.reference.remask import remask as reference

MASK = 16384
Remask = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_threshold(ids: Tensor, confidence: Tensor, counts: Tensor) -> Tensor:
    """Everything up to the k-th smallest confidence; -inf stands before the smallest."""
    ascending = torch.nn.functional.pad(confidence.sort(-1).values, (1, 0), value=float("-inf"))
    return ids.masked_fill(confidence <= ascending.gather(1, counts[:, None]), MASK)


def implementations(device: str, compiled: bool) -> dict[str, Remask]:
    """Name -> function of (ids, confidence, counts); for what cannot run here the reason is printed."""
    found: dict[str, Remask] = {}
    for name, (usable, reason) in report(device)["remask"].items():
        if usable:
            found[name] = lambda ids, confidence, counts, name=name: remask(ids, confidence, counts, MASK, backend=name)
        else:
            print(f"not measured: {name}: {reason}")
    found["torch eager"] = lambda ids, confidence, counts: reference(ids, confidence, counts, MASK)
    found["torch sort + threshold"] = by_threshold
    if compiled:
        compile_ = torch.compile(reference, dynamic=False)
        found["torch.compile(reference)"] = lambda ids, confidence, counts: compile_(ids, confidence, counts, MASK)
    else:
        print("not measured: torch.compile: --no-compile")
    return found


def check_parity(candidates: dict[str, Remask], ids: Tensor, confidence: Tensor, counts: Tensor) -> None:
    """SystemExit unless each gives the reference's tokens, and masks as many as asked for."""
    want = reference(ids, confidence, counts, MASK)
    for name, run in candidates.items():
        got = run(ids, confidence, counts)
        wrong = int((got != want).sum())
        print(f"parity {name}: {wrong} of {want.numel()} tokens differ")
        if wrong or not torch.equal((got == MASK).sum(1), counts):
            sys.exit(f"error: {name} is wrong, nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="timed calls of each (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all alike (torch's default)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    arguments = parser.parse_args()
    for name in ("rows", "tokens", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    rows, tokens, device = arguments.rows, arguments.tokens, arguments.device
    ids = torch.randint(0, MASK, (rows, tokens), device=device)
    distinct = torch.stack([torch.randperm(tokens) for _ in range(rows)]) / tokens - 0.5
    confidence = distinct.to(device, getattr(torch, arguments.dtype))
    counts = torch.randint(0, tokens + 1, (rows,), device=device)
    candidates = implementations(device, not arguments.no_compile)
    check_parity(candidates, ids, confidence, counts)
    calls = {name: (lambda run=run: run(ids, confidence, counts)) for name, run in candidates.items()}
    results = summary(interleave(calls, arguments.rounds, device))

    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    size = 2 * ids.nbytes + confidence.nbytes + counts.nbytes  # read and written once
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "gb_per_s": {name: size / result["median_ms"] / 1e6 for name, result in results.items()},
    }
    shape = {name: getattr(arguments, name) for name in ("rows", "tokens", "dtype", "rounds")}
    print_results("remask", device, shape, results, **more)


if __name__ == "__main__":
    main()
