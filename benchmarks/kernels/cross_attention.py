"""cross_attention against SDPA with a boolean mask, flash-attn without one, and the compiled reference.

    python benchmarks/kernels/cross_attention.py [--batch 2 --queries 256 --keys 300 --heads 16 --head-size 72]
        [--dtype bfloat16] [--full] [--train] [--no-compile] [--rounds 15] [--device cpu]

First all results must agree; then all are timed in turns. Lengths are spread over 1..keys, or all equal to keys with
``--full``. ``--train`` times forward and backward together. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _attention import TYPES, backends, check_parity, compiled, flash_attn, formula, libraries, training
from _compare import interleave, print_results, summary
from torch import Tensor

from dcar_fast.ops import cross_attention
from dcar_fast.reference.cross_attention import cross_attention as reference


def candidates(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, mask: Tensor | None, with_compile: bool
) -> dict[str, Callable[[], Tensor]]:
    """Name -> call; for what cannot run here the reason is printed."""
    found = {
        name: (lambda name=name: cross_attention(q, k, v, lengths, backend=name))
        for name in backends("cross_attention", q.device.type)
    }
    found |= compiled(with_compile, reference=lambda: reference(q, k, v, lengths))
    for name, attend in libraries(mask, q, k, v).items():
        found[name] = lambda attend=attend: attend(q, k, v)
    flash = flash_attn(q)
    if flash and mask is None:
        found["flash-attn"] = lambda: flash(q, k, v)
    elif flash:
        print("not measured: flash-attn: without --full it would need keys packed on the host")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--queries", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--keys", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--head-size", type=int, default=72, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each (%(default)s)")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16", help="(%(default)s)")
    parser.add_argument("--full", action="store_true", help="every row has all keys")
    parser.add_argument("--train", action="store_true", help="time forward and backward")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    arguments = parser.parse_args()
    for name in ("batch", "queries", "keys", "heads", "head_size", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")

    torch.manual_seed(0)
    device, dtype = arguments.device, TYPES[arguments.dtype]
    rows, heads = (arguments.batch, arguments.heads, arguments.head_size), arguments.heads
    q = torch.randn(rows[0], arguments.queries, *rows[1:], device=device).to(dtype)
    kv = torch.randn(rows[0], arguments.keys, 2, *rows[1:], device=device).to(dtype)  # as one projection gives them
    k, v = kv[:, :, 0], kv[:, :, 1]
    lengths = torch.full((rows[0],), arguments.keys, device=device)
    if not arguments.full:
        lengths = torch.linspace(1, arguments.keys, rows[0], device=device).long()

    mask = None
    if not arguments.full:
        mask = (torch.arange(arguments.keys, device=device) < lengths[:, None])[:, None, None]

    inputs = [x.requires_grad_(arguments.train) for x in (q, k, v)]
    calls = candidates(*inputs, lengths, mask, not arguments.no_compile)
    exact = reference(*(x.detach().double() for x in inputs), lengths)
    outputs = {name: (lambda call=call: call().detach()) for name, call in calls.items()}
    check_parity(outputs, formula(mask)(*inputs).detach(), exact)
    timed = training(calls, inputs) if arguments.train else calls
    results = summary(interleave(timed, arguments.rounds, device))

    products = 2 if not arguments.train else 7  # forward; its recomputation adds one, the gradients four
    flop = 2 * products * arguments.queries * heads * arguments.head_size * int(lengths.sum())
    sizes = {name: getattr(arguments, name) for name in ("batch", "queries", "keys", "heads", "head_size", "dtype")}
    modes = {name: getattr(arguments, name) for name in ("full", "train", "rounds")}
    best = min((name for name in results if name.startswith("torch")), key=lambda name: results[name]["median_ms"])
    rates = {name: flop / result["median_ms"] / 1e9 for name, result in results.items()}
    print_results("cross_attention", device, {**sizes, **modes}, results, fastest_torch=best, tflop_per_s=rates)


if __name__ == "__main__":
    main()
