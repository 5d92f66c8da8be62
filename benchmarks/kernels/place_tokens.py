"""place_tokens against PyTorch: every usable backend, and the reference eager and compiled.

    python benchmarks/kernels/place_tokens.py [--batch 2 --tokens 256] [--noise counter] [--rounds 100] [--device cpu]

A middle step: an eighth of the positions is known, three quarters are masked again. First every implementation must
give the reference's tokens and rows; then they are timed in turns. Ends with one JSON line. With ``--noise recorded``
the uniforms are there already and nobody draws them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from _compare import interleave, print_results, summary  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.noise import ConfidenceNoise
from dcar_fast.ops import place_tokens, report
from dcar_fast.ops._dispatch import BACKENDS
from dcar_fast.reference.place_tokens import place_tokens as reference

MASK = 16384
Place = Callable[..., tuple[Tensor, Tensor]]


def implementations(device: str, compiled: bool) -> dict[str, Place]:
    """Name -> function; for what cannot run here the reason is printed."""
    found: dict[str, Place] = {}
    for name, (usable, reason) in report(device)["place_tokens"].items():
        if usable:
            found[name] = lambda *inputs, name=name, **settings: place_tokens(*inputs, **settings, backend=name)
        else:
            print(f"not measured: {name}: {reason}")
    found["torch eager"] = reference
    if compiled:
        found["torch.compile(reference)"] = torch.compile(reference, dynamic=False)
    else:
        print("not measured: torch.compile: --no-compile")
    return found


def check_parity(candidates: dict[str, Place], inputs: tuple, settings: dict) -> None:
    """SystemExit unless each gives the reference's tokens, but for ties within rounding, and masks as many."""
    want, _ = reference(*inputs, **settings)
    counts = (want == MASK).sum(1)
    for name, run in candidates.items():
        got, rows = run(*inputs, **settings)
        wrong = int((got != want).sum())
        print(f"parity {name}: {wrong} of {want.numel()} tokens differ")
        listed = got.gather(1, rows[:, : int(counts.min())])
        if wrong > want.numel() // 1000 or not torch.equal((got == MASK).sum(1), counts) or (listed != MASK).any():
            sys.exit(f"error: {name} is wrong, nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--noise", default="counter", choices=("counter", "recorded"), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all alike (torch's default)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    arguments = parser.parse_args()
    for name in ("batch", "tokens", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    batch, tokens, device = arguments.batch, arguments.tokens, arguments.device
    ids = torch.full((batch, tokens), MASK, device=device)
    ids[:, ::8] = torch.randint(0, MASK, ids[:, ::8].shape, device=device)
    rows = (ids != MASK).byte().argsort(dim=1, stable=True)[:, : max(1, tokens - len(ids[0, ::8]))]
    sampled, confidence = torch.randint(0, MASK, rows.shape, device=device), torch.randn(rows.shape, device=device)
    masked = int((ids[0] == MASK).sum()) * 3 // 4
    counts = torch.full((batch,), masked, device=device)
    noise = torch.rand(batch, tokens, device=device)
    if arguments.noise == "counter":
        noise = ConfidenceNoise(torch.arange(batch, device=device), 1)
    inputs, settings = (ids, rows, sampled, confidence, counts, MASK), {"tau": 1.0, "noise": noise, "next_open": masked}
    candidates = implementations(device, not arguments.no_compile)
    check_parity(candidates, inputs, settings)
    calls = {name: (lambda run=run: run(*inputs, **settings)) for name, run in candidates.items()}
    results = summary(interleave(calls, arguments.rounds, device))

    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
    }
    shape = {name: getattr(arguments, name) for name in ("batch", "tokens", "noise", "rounds")}
    print_results("place_tokens", device, shape, results, **more)


if __name__ == "__main__":
    main()
