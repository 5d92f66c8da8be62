"""What a call costs besides the work: every C++ op called at four depths, with little to do.

    python benchmarks/kernels/overhead.py [--calls 2000] [--repeats 7]

"public" is the function of dcar_fast.ops, which checks its arguments; "torch.library" the operator it calls, which
chooses a backend; "backend" the chosen function; "bare" the native module's, which gets addresses. Each inner call is
timed where the outer one makes it, with what the outer one passes, so what it takes holds what the ones inside take.
One thread; microseconds of the fastest repeat, whose calls run back to back. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from _compare import _cpu_name, table  # makes dcar_fast importable, so it is first
from _report import commit, environment

from dcar_fast import ops
from dcar_fast.ops import _native

LEVELS = ("public", "torch.library", "backend", "bare")


def inputs() -> dict[str, tuple[tuple, dict[str, Any]]]:
    """Op name -> arguments: one image of 256 tokens, or one row for the ops whose rows are costly."""
    torch.manual_seed(0)
    ids, codebook, residual = torch.randint(0, 64, (1, 16, 16)), torch.randn(64, 32), torch.randn(1, 256, 32)
    settings = {"guidance": 4.5, "softmax_temperature": 1.0, "tau": 1.0}
    return {
        "add_residual": ((ids, codebook, residual), {"dtype": torch.float32}),
        "remask": ((ids.flatten(1), residual[..., 0].contiguous(), torch.tensor([100]), 64), {}),
        "sample_from_logits": ((residual[0, :1], residual[0, 1:2]), {**settings, "noise": torch.rand(1, 32)}),
        "vq_lookup": ((residual[0, :1], codebook), {}),
    }


def measure(op: str, arguments: tuple, keywords: dict[str, Any], time_of: Callable) -> dict[str, float]:
    """Seconds per call at every level."""
    public, module = getattr(ops, op), sys.modules[f"dcar_fast.ops.{op}"]
    seconds = {}

    def timed(level: str, function: Callable) -> Callable:
        def inner(*arguments: Any, **keywords: Any) -> Any:
            seconds[level] = time_of(lambda: function(*arguments, **keywords))
            return function(*arguments, **keywords)

        return inner

    operator, choose, native = getattr(module, f"_{op}"), module.choose, _native.module()
    timed("public", public)(*arguments, **keywords)
    with mock.patch.object(module, f"_{op}", timed("torch.library", operator)):
        public(*arguments, **keywords)
    with mock.patch.object(module, "choose", lambda *how: SimpleNamespace(run=timed("backend", choose(*how).run))):
        public(*arguments, **keywords)
    # The arrays behind the addresses live as long as the backend's call: the bare one is timed within it.
    bare = SimpleNamespace(**{**vars(native), op: timed("bare", getattr(native, op))})
    with mock.patch.object(_native, "module", lambda: bare):
        public(*arguments, **keywords)
    return {level: seconds[level] for level in LEVELS}


def registration(time_of: Callable) -> dict[str, float]:
    """Seconds for an operator that makes one number: as a plain function, by ``Library.define`` and ``impl`` as the ops
    here, and by ``torch.library.custom_op``."""

    def make(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(1)

    library, x = torch.library.Library("dcar_fast_overhead", "DEF"), torch.zeros(1)
    library.define("defined(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("defined", make, "CompositeExplicitAutograd")
    custom = torch.library.custom_op("dcar_fast_overhead::custom", make, mutates_args=(), schema="(Tensor x) -> Tensor")
    defined = torch.ops.dcar_fast_overhead.defined.default
    functions = {"plain": make, "define": defined, "custom_op": custom}
    return {name: time_of(lambda function=function: function(x)) for name, function in functions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=2000, help="calls in a repeat (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of which the fastest counts (%(default)s)")
    arguments = parser.parse_args()
    for name in ("calls", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if not (usable := _native.cpu_usable(torch.device("cpu"))).ok:
        sys.exit(f"error: nothing to measure: {usable.reason}")
    torch.set_num_threads(1)

    def time_of(call: Callable[[], object]) -> float:
        fastest = float("inf")
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            for _ in range(arguments.calls):
                call()
            fastest = min(fastest, time.perf_counter() - start)
        return fastest / arguments.calls

    results = {op: measure(op, *given, time_of) for op, given in inputs().items()}
    rows = [(op, *(f"{1e6 * seconds[level]:.1f}" for level in LEVELS)) for op, seconds in results.items()]
    registered = registration(time_of)
    print(table(("registration", "us"), [(name, f"{1e6 * value:.1f}") for name, value in registered.items()]))
    print(table(("op", *(f"{level} us" for level in LEVELS)), rows))
    line = {
        "benchmark": "overhead",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu",
        "hardware": _cpu_name(),
        "threads": torch.get_num_threads(),
        "calls": arguments.calls,
        "repeats": arguments.repeats,
        "results": {
            op: {f"{level}_us": 1e6 * value for level, value in seconds.items()} for op, seconds in results.items()
        },
        "registration": {f"{name}_us": 1e6 * value for name, value in registered.items()},
        "versions": environment("cpu"),
        "commit": commit(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
