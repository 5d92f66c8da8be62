"""embed_tokens against PyTorch: every usable backend, and embedding plus positions, eager and compiled.

    python benchmarks/kernels/embed_tokens.py [--batch 16 --tokens 256 --width 1152] [--codes 16384] [--dtype bfloat16]
                                              [--no-compile] [--rounds 50] [--device cpu]

What PyTorch runs makes no row moments, so it does less. First all results must agree; then all are timed in turns. Ends
with one JSON line.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from _attention import TYPES, backends, check_parity, compiled
from _compare import interleave, print_results, summary
from torch import Tensor

from dcar_fast.ops import embed_tokens
from dcar_fast.ops._dispatch import BACKENDS


def in_torch(ids: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    return F.embedding(ids, table) + positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="per image (%(default)s)")
    parser.add_argument("--width", type=int, default=1152, help="(%(default)s)")
    parser.add_argument("--codes", type=int, default=16384, help="the mask comes on top (%(default)s)")
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each (%(default)s)")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16", help="(%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    arguments = parser.parse_args()
    sizes = ("batch", "tokens", "width", "codes", "rounds")
    for name in sizes:
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")

    torch.manual_seed(0)
    device, dtype = arguments.device, TYPES[arguments.dtype]
    ids = torch.randint(0, arguments.codes + 1, (arguments.batch, arguments.tokens), device=device)
    table = torch.randn(arguments.codes + 1, arguments.width, device=device).to(dtype)
    positions = torch.randn(arguments.tokens, arguments.width, device=device).to(dtype)
    inputs = (ids, table, positions)
    here = backends("embed_tokens", ids.device.type)
    calls = {name: (lambda name=name: embed_tokens(*inputs, backend=name)[0]) for name in here}
    calls |= {"torch eager": lambda: in_torch(*inputs)}
    calls |= compiled(not arguments.no_compile, eager=lambda: in_torch(*inputs))
    check_parity(calls, in_torch(*inputs), in_torch(ids, table.double(), positions.double()))
    results = summary(interleave(calls, arguments.rounds, device))

    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    size = ids.nbytes + (2 * ids.numel() + arguments.tokens) * arguments.width * dtype.itemsize
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "gb_per_s": {name: size / result["median_ms"] / 1e6 for name, result in results.items()},
    }
    print_results("embed_tokens", device, {n: getattr(arguments, n) for n in (*sizes, "dtype")}, results, **more)


if __name__ == "__main__":
    main()
