"""add_residual against PyTorch: every usable backend, the reference eager and compiled, and the shortest eager way.

    python benchmarks/kernels/add_residual.py [--batch 16 --tokens 256 --channels 32] [--inputs float32]
                                              [--outputs float32] [--rounds 200] [--device cpu]

First every implementation must agree with float64; then they are timed in turns. Ends with one JSON line. The shortest
eager way is given a codebook that is normalised already and does not normalise, so it does less than all others.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _compare import interleave, print_results, summary  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.ops import add_residual, report
from dcar_fast.ops._dispatch import BACKENDS
from dcar_fast.reference.add_residual import add_residual as reference

DTYPES = ("float32", "bfloat16", "float16")
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


def implementations(device: str, dtype: torch.dtype, compiled: bool) -> dict[str, Decode]:
    """Name -> function of (ids, codebook, residual); for what cannot run here the reason is printed."""

    def without_normalising(ids: Tensor, codebook: Tensor, residual: Tensor) -> Tensor:
        rows = (F.embedding(ids.flatten(1), codebook).float() + residual).to(dtype)
        return rows.transpose(1, 2).contiguous().view(len(ids), -1, *ids.shape[1:])

    found: dict[str, Decode] = {}
    for name, (usable, reason) in report(device)["add_residual"].items():
        if usable:
            found[name] = lambda *inputs, name=name: add_residual(*inputs, dtype=dtype, backend=name)
        else:
            print(f"not measured: {name}: {reason}")
    found["torch eager"] = lambda *inputs: reference(*inputs, dtype=dtype)
    found["torch without normalising"] = without_normalising
    if compiled:
        compile_ = torch.compile(reference, dynamic=False)
        found["torch.compile(reference)"] = lambda *inputs: compile_(*inputs, dtype=dtype)
    else:
        print("not measured: torch.compile: --no-compile")
    return found


def check_parity(candidates: dict[str, Decode], ids: Tensor, codebook: Tensor, residual: Tensor) -> None:
    """SystemExit unless each is as near to float64 as its output type and the codebook's allow."""
    want = reference(ids, codebook.double(), residual.double(), dtype=torch.float64)
    for name, run in candidates.items():
        got = run(ids, codebook, residual)
        error = (got.double() - want).abs().max().item()
        # the codes' length is 1 up to their type's rounding; sums are below 8
        allowed = 8 * torch.finfo(got.dtype).eps + 4 * torch.finfo(codebook.dtype).eps
        print(f"parity {name}: off by {error:.1e}, allowed {allowed:.1e}")
        if not error <= allowed:
            sys.exit(f"error: {name} is wrong, nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="per image, a square number (%(default)s)")
    parser.add_argument("--channels", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--codes", type=int, default=16384, help="(%(default)s)")
    parser.add_argument("--inputs", default="float32", choices=DTYPES, help="codebook and residual (%(default)s)")
    parser.add_argument("--outputs", default="float32", choices=DTYPES, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="timed calls of each (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all alike (torch's default)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    arguments = parser.parse_args()
    for name in ("batch", "tokens", "channels", "codes", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    side = math.isqrt(arguments.tokens)
    if side * side != arguments.tokens:
        parser.error(f"--tokens must be a square number, got {arguments.tokens}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    device, inputs, outputs = arguments.device, getattr(torch, arguments.inputs), getattr(torch, arguments.outputs)
    ids = torch.randint(0, arguments.codes, (arguments.batch, side, side), device=device)
    codebook = F.normalize(torch.randn(arguments.codes, arguments.channels, device=device)).to(inputs)
    residual = torch.randn(arguments.batch, arguments.tokens, arguments.channels, device=device).to(inputs)
    candidates = implementations(device, outputs, not arguments.no_compile)
    check_parity(candidates, ids, codebook, residual)
    calls = {name: (lambda run=run: run(ids, codebook, residual)) for name, run in candidates.items()}
    results = summary(interleave(calls, arguments.rounds, device))

    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    read = ids.nbytes + residual.nbytes + ids.numel() * arguments.channels * codebook.element_size()
    size = read + residual.numel() * outputs.itemsize
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "gb_per_s": {name: size / result["median_ms"] / 1e6 for name, result in results.items()},
    }
    shape = {n: getattr(arguments, n) for n in ("batch", "tokens", "channels", "codes", "inputs", "outputs", "rounds")}
    print_results("add_residual", device, shape, results, **more)


if __name__ == "__main__":
    main()
