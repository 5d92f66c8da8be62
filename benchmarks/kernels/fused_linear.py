"""fused_linear against what PyTorch needs several operators for, eager and compiled.

    python benchmarks/kernels/fused_linear.py [--layer qkv|proj|fc1|fc2] [--rows 512] [--width 1152 --hidden 4608]
                                              [--dtype bfloat16] [--no-compile] [--rounds 30] [--device cpu]

The layers of a transformer block: qkv (LayerNorm before it, row moments after it), proj (residual and moments), fc1
(LayerNorm and GELU), fc2 (residual and moments). What PyTorch runs makes no moments, its LayerNorm needs none. First
all results must agree; then all are timed in turns. Ends with one JSON line, with TFLOP/s of the product alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _attention import TYPES, backends, check_parity, compiled
from _compare import interleave, print_results, summary
from torch import Tensor

from dcar_fast.ops import fused_linear
from dcar_fast.ops._dispatch import BACKENDS
from dcar_fast.reference._moments import row_moments


class Layer(NamedTuple):
    """Widths in terms of the model's, and what stands around the product."""

    outer: Callable[[int, int], int]
    inner: Callable[[int, int], int]
    normed: bool = False
    gelu: bool = False
    residual: bool = False
    emits: bool = False


LAYERS = {
    "qkv": Layer(lambda width, hidden: 3 * width, lambda width, hidden: width, normed=True, emits=True),
    "proj": Layer(lambda width, hidden: width, lambda width, hidden: width, residual=True, emits=True),
    "fc1": Layer(lambda width, hidden: hidden, lambda width, hidden: width, normed=True, gelu=True),
    "fc2": Layer(lambda width, hidden: width, lambda width, hidden: hidden, residual=True, emits=True),
}


def in_torch(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The layer as a model without this op computes it."""
    if layer.normed:
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    y = F.linear(x, weight, bias)
    if layer.gelu:
        y = F.gelu(y, approximate="tanh")
    return y + residual if layer.residual else y


def in_one_product(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The same with what cuBLAS takes into its product: bias and GELU (on a CPU it would be another GELU), or the
    residual."""
    if layer.normed:
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    if layer.gelu and x.is_cuda:
        return torch._addmm_activation(bias, x[0], weight.T, use_gelu=True)[None]
    if layer.residual:
        return torch.addmm(residual[0], x[0], weight.T)[None] + bias
    y = torch.addmm(bias, x[0], weight.T)[None]
    return F.gelu(y, approximate="tanh") if layer.gelu else y


def candidates(layer: Layer, inputs: list[Tensor], with_compile: bool) -> dict[str, Callable[[], Tensor]]:
    """Name -> call; for what cannot run here the reason is printed."""
    x, weight, bias, residual = inputs
    how = {"activation": "gelu" if layer.gelu else "none", "emit_moments": layer.emits}
    if layer.residual:
        how["residual"] = residual
    if layer.normed:
        how |= {"moments": row_moments(x), "colsum": weight.sum(dim=1, dtype=torch.float32)}

    def by_op(backend: str) -> Tensor:
        found = fused_linear(x, weight, bias, **how, backend=backend)
        return found[0] if layer.emits else found

    found = {name: (lambda name=name: by_op(name)) for name in backends("fused_linear", x.device.type)}
    functions = {"torch eager": in_torch, "torch addmm": in_one_product}
    found |= {name: (lambda call=call: call(layer, *inputs)) for name, call in functions.items()}
    return found | compiled(with_compile, eager=lambda: in_torch(layer, *inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layer", choices=LAYERS, default="qkv", help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=1152, help="of the model (%(default)s)")
    parser.add_argument("--hidden", type=int, default=4608, help="of its MLP (%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each (%(default)s)")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16", help="(%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    arguments = parser.parse_args()
    for name in ("rows", "width", "hidden", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")

    torch.manual_seed(0)
    device, dtype, layer = arguments.device, TYPES[arguments.dtype], LAYERS[arguments.layer]
    outer, inner = (size(arguments.width, arguments.hidden) for size in (layer.outer, layer.inner))
    shapes = ((1, arguments.rows, inner), (outer, inner), (outer,), (1, arguments.rows, outer))
    inputs = [torch.randn(*shape, device=device) for shape in shapes]
    inputs[1] *= inner**-0.5
    inputs = [x.to(dtype) for x in inputs]
    calls = candidates(layer, inputs, not arguments.no_compile)
    check_parity(calls, in_torch(layer, *inputs), in_torch(layer, *(x.double() for x in inputs)))
    results = summary(interleave(calls, arguments.rounds, device))

    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    flops = 2 * arguments.rows * outer * inner
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "tflop_per_s": {name: flops / result["median_ms"] / 1e9 for name, result in results.items()},
    }
    shape = {n: getattr(arguments, n) for n in ("layer", "rows", "width", "hidden", "dtype", "rounds")}
    print_results("fused_linear", device, shape, results, **more)


if __name__ == "__main__":
    main()
