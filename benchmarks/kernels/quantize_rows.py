"""quantize_rows against what PyTorch needs several operators for, eager and compiled.

    python benchmarks/kernels/quantize_rows.py [--layer fc1|fc2] [--rows 512] [--width 1152 --hidden 4608]
                                               [--dtype bfloat16] [--no-compile] [--rounds 30] [--device cpu]

What a transformer block quantises: the input of qkv and fc1 (--layer fc1, LayerNorm from row moments before it) and
of fc2. PyTorch's LayerNorm needs no moments. First what the results stand for must agree; then all are timed in turns.
Ends with one JSON line, with GB/s of the rows read and written.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from _attention import TYPES, backends, check_parity, compiled
from _compare import interleave, print_results, summary
from torch import Tensor

from dcar_fast.ops import quantize_rows
from dcar_fast.ops._dispatch import BACKENDS
from dcar_fast.reference._moments import row_moments


def in_torch(x: Tensor, normed: bool) -> tuple[Tensor, Tensor]:
    """As a model without this op would."""
    x = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) if normed else x.float()
    scale = x.abs().amax(dim=-1) / 448
    return (x / scale[..., None]).to(torch.float8_e4m3fn), scale


def stands_for(result: tuple[Tensor, Tensor]) -> Tensor:
    values, scale = result
    return values.float() * scale[..., None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layer", choices=("fc1", "fc2"), default="fc1", help="(%(default)s)")
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
    device, dtype, normed = arguments.device, TYPES[arguments.dtype], arguments.layer == "fc1"
    x = torch.randn(1, arguments.rows, arguments.width if normed else arguments.hidden, device=device).to(dtype)
    moments = row_moments(x) if normed else None
    here = backends("quantize_rows", x.device.type)
    calls = {name: (lambda name=name: quantize_rows(x, moments=moments, backend=name)) for name in here}
    calls |= {"torch eager": lambda: in_torch(x, normed)}
    calls |= compiled(not arguments.no_compile, eager=lambda: in_torch(x, normed))
    truth = F.layer_norm(x.double(), x.shape[-1:], eps=1e-6) if normed else x.double()
    check_parity(
        {name: (lambda call=call: stands_for(call())) for name, call in calls.items()},
        stands_for(in_torch(x, normed)),
        truth,
    )
    results = summary(interleave(calls, arguments.rounds, device))

    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    size = x.nbytes + x.numel() + 4 * arguments.rows
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "gb_per_s": {name: size / result["median_ms"] / 1e6 for name, result in results.items()},
    }
    shape = {n: getattr(arguments, n) for n in ("layer", "rows", "width", "hidden", "dtype", "rounds")}
    print_results("quantize_rows", device, shape, results, **more)


if __name__ == "__main__":
    main()
