"""self_attention against LayerNorm and SDPA, flash-attn, and the compiled reference.

    python benchmarks/kernels/self_attention.py [--batch 2 --tokens 256 --heads 16 --head-size 72]
        [--dtype bfloat16] [--train] [--no-compile] [--rounds 15] [--device cpu]

First all results must agree; then all are timed in turns. ``--train`` times forward and backward together. Ends with
one JSON line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _attention import TYPES, Attend, backends, check_parity, compiled, flash_attn, formula, libraries, training
from _compare import interleave, print_results, summary
from torch import Tensor

from dcar_fast.ops import self_attention
from dcar_fast.reference.self_attention import self_attention as reference


def normalised(attend: Attend, heads: int) -> Callable[..., Tensor]:
    """What a model without this op does: split, LayerNorm twice, ``attend``."""

    def call(qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = F.layer_norm(q, q_weight.shape, q_weight, q_bias), F.layer_norm(k, k_weight.shape, k_weight, k_bias)
        return attend(*(x.unflatten(-1, (heads, -1)) for x in (q, k, v))).flatten(2)

    return call


def candidates(inputs: list[Tensor], heads: int, with_compile: bool) -> dict[str, Callable[[], Tensor]]:
    """Name -> call; for what cannot run here the reason is printed."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in inputs[0].chunk(3, dim=-1))
    attends = libraries(None, q, k, v)
    if flash := flash_attn(q):
        attends["flash-attn"] = flash
    found = {
        name: (lambda name=name: self_attention(*inputs, heads=heads, backend=name))
        for name in backends("self_attention", q.device.type)
    }
    for name, attend in attends.items():
        found[name] = lambda attend=attend: normalised(attend, heads)(*inputs)
    usual = normalised(attends["torch sdpa"], heads)
    functions = {"reference": lambda: reference(*inputs, heads=heads), "layer_norm_sdpa": lambda: usual(*inputs)}
    return found | compiled(with_compile, **functions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--head-size", type=int, default=72, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each (%(default)s)")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16", help="(%(default)s)")
    parser.add_argument("--train", action="store_true", help="time forward and backward")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    arguments = parser.parse_args()
    for name in ("batch", "tokens", "heads", "head_size", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")

    torch.manual_seed(0)
    device, dtype, heads = arguments.device, TYPES[arguments.dtype], arguments.heads
    width = heads * arguments.head_size
    inputs = [torch.randn(arguments.batch, arguments.tokens, 3 * width, device=device).to(dtype)]
    inputs += [torch.randn(width, device=device).to(dtype) for _ in range(4)]
    inputs = [x.requires_grad_(arguments.train) for x in inputs]
    calls = candidates(inputs, heads, not arguments.no_compile)
    detached = [x.detach() for x in inputs]
    exact = reference(*(x.double() for x in detached), heads=heads)
    outputs = {name: (lambda call=call: call().detach()) for name, call in calls.items()}
    check_parity(outputs, normalised(formula(None), heads)(*detached), exact)
    timed = training(calls, inputs) if arguments.train else calls
    results = summary(interleave(timed, arguments.rounds, device))

    products = 2 if not arguments.train else 7  # forward; its recomputation adds one, the gradients four
    flop = 2 * products * arguments.batch * arguments.tokens**2 * width
    sizes = {name: getattr(arguments, name) for name in ("batch", "tokens", "heads", "head_size", "dtype")}
    modes = {name: getattr(arguments, name) for name in ("train", "rounds")}
    best = min((name for name in results if name.startswith("torch")), key=lambda name: results[name]["median_ms"])
    rates = {name: flop / result["median_ms"] / 1e9 for name, result in results.items()}
    print_results("self_attention", device, {**sizes, **modes}, results, fastest_torch=best, tflop_per_s=rates)


if __name__ == "__main__":
    main()
