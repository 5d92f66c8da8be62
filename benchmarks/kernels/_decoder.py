"""What the benchmarks of the decoder's ops share: options, candidates, parity, rates. They work on images (B, C, H, W)
and are bound by memory, so a GPU's result is GB/s: every input read once and the output written once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from _compare import interleave, print_results, summary  # makes dcar_fast importable, so it is first
from torch import Tensor

from dcar_fast.ops import report
from dcar_fast.ops._dispatch import BACKENDS

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Op = Callable[..., Tensor]


def options(description: str, channels: int, side: int) -> argparse.ArgumentParser:
    """The options that every op has; ``channels`` and ``side`` are defaults."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--channels", type=int, default=channels, help="of the output (%(default)s)")
    parser.add_argument("--side", type=int, default=side, help="height and width of the input (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=TYPES, help="(%(default)s)")
    parser.add_argument(
        "--layout", default="channels_last", choices=("channels_last", "contiguous"), help="(%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads, for all alike (torch's default)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes its time first")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def image(arguments: argparse.Namespace, channels: int) -> Tensor:
    shape = (arguments.batch, channels, arguments.side, arguments.side)
    x = torch.randn(shape, device=arguments.device).to(TYPES[arguments.dtype])
    return x.to(
        memory_format=getattr(torch, {"contiguous": "contiguous_format"}.get(arguments.layout, arguments.layout))
    )


def candidates(op: str, call: Op, eager: Op, arguments: argparse.Namespace) -> dict[str, Op]:
    """Name -> function of the inputs. ``call`` is the op, ``eager`` the model's own lines in the inputs' type; what
    cannot run here is named with the reason."""
    found: dict[str, Op] = {}
    for name, (usable, reason) in report(arguments.device)[op].items():
        if usable:
            found[name] = lambda *inputs, name=name: call(*inputs, backend=name)
        else:
            print(f"not measured: {name}: {reason}")
    found["torch eager"] = eager
    if arguments.no_compile:
        print("not measured: torch.compile: --no-compile")
    else:
        found["torch.compile"] = torch.compile(eager, dynamic=False)
    return found


def check_parity(found: Mapping[str, Op], eager: Op, reference: Op, images: Sequence[Tensor], rest: Sequence[Tensor]):
    """SystemExit unless the first and the last image of each are within twice the error of ``eager`` against float64,
    and rounding. ``reference`` takes float64; ``rest`` are the inputs that are no images."""
    ends = torch.tensor([0, len(images[0]) - 1], device=images[0].device)
    truth = reference(*(x[ends].double() for x in images), *(x.double() for x in rest))
    plain = eager(*(x[ends] for x in images), *rest)
    rounding = torch.finfo(plain.dtype).eps * truth.abs().max().item()
    allowed = 2 * ((plain.double() - truth).abs().max().item() + rounding)
    for name, run in found.items():
        error = (run(*images, *rest)[ends].double() - truth).abs().max().item()
        print(f"parity {name}: off by {error:.1e}, allowed {allowed:.1e}")
        if not error <= allowed:
            sys.exit(f"error: {name} is wrong, nothing was timed")


def measure(
    op: str,
    call: Op,
    eager: Op,
    reference: Op,
    images: Sequence[Tensor],
    rest: Sequence[Tensor],
    arguments: argparse.Namespace,
) -> None:
    """Parity, times in turns, the table and the JSON line."""
    with torch.inference_mode():
        found = candidates(op, call, eager, arguments)
        check_parity(found, eager, reference, images, rest)
        size = sum(x.nbytes for x in (*images, *rest)) + eager(*images, *rest).nbytes
        calls = {name: (lambda run=run: run(*images, *rest)) for name, run in found.items()}
        results = summary(interleave(calls, arguments.rounds, arguments.device))
    torch_best = min((name for name in results if name.startswith("torch")), key=lambda n: results[n]["median_ms"])
    more = {
        "fastest_torch": torch_best,
        "speedup": {n: results[torch_best]["median_ms"] / r["median_ms"] for n, r in results.items() if n in BACKENDS},
        "gb_per_s": {name: size / result["median_ms"] / 1e6 for name, result in results.items()},
    }
    shape = {name: value for name, value in vars(arguments).items() if name not in ("device", "threads", "no_compile")}
    print_results(op, arguments.device, shape, results, **more)
