"""Diffusion heads of other codebases, as they are and patched: one call of ``sample``.

    python benchmarks/integrations.py                                   # MAR-B, 64 rows, 100 steps
    python benchmarks/integrations.py --heads mar-b mar-l mar-h hart dcar --rows 1 16 64 256 1024 4096 --json out.json

The originals are re-implementations of their public behaviour (tests/integrations/mar_family.py) with random weights.
Before anything is timed, both are run from the same seed: MAR's unclipped head on a schedule that starts at t = 499,
where noise and temperature show. Original and patched take turns; medians, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _report import ROOT, Failure, commit, duration, environment, note, table, threads

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # the originals are in tests/

import torch
from torch import Tensor, nn

from dcar_fast.integrations import explain, patch_diffloss
from tests.integrations.mar_family import HartDiffLoss, MarDiffLoss, randomise


@dataclass(frozen=True)
class Head:
    """depth blocks of ``width``, for conditions of size z; ``parity``: the respacing on which results are compared."""

    kind: type[nn.Module]
    depth: int
    width: int
    z: int
    channels: int
    steps: str
    parity: str
    guidance: float


HEADS = {
    "mar-b": Head(MarDiffLoss, 6, 1024, 768, 16, "100", "20,0", 2.9),
    "mar-l": Head(MarDiffLoss, 8, 1280, 1024, 16, "100", "20,0", 2.9),
    "mar-h": Head(MarDiffLoss, 12, 1536, 1280, 16, "100", "20,0", 2.9),
    "hart": Head(HartDiffLoss, 6, 1024, 1536, 32, "8", "8", 1.5),
    "dcar": Head(HartDiffLoss, 6, 1024, 1152, 32, "32", "32", 4.5),
}
TOLERANCE = 1e-3  # in float32, of the largest value
BFLOAT16_FACTOR = 2.0  # patched may be off by so many times the original's own error, and by rounding


def main() -> None:
    args = parse()
    results = []
    try:
        for name in args.heads:
            head = make(name, args.steps or HEADS[name].steps, args.device)
            note(explain(head))
            for rows in args.rows:
                for dtype in args.dtypes:
                    results.append(measure(name, head, rows, dtype, args))
                    show(results[-1])
    except Failure as failure:
        sys.exit(str(failure))
    print(table(*columns(results)))
    line = {
        "benchmark": "integrations",
        "command": "python benchmarks/integrations.py " + " ".join(sys.argv[1:]),
        "threads": threads(args.device),
        "commit": commit(),
        "environment": environment(args.device),
        "results": results,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["mar-b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[64], help="of the condition; halves under guidance")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--steps", help="respacing of the timed schedule; default: that of each head")
    parser.add_argument("--guided", action="store_true", help="with classifier-free guidance")
    parser.add_argument("--rng", choices=("parity", "counter"), default="parity")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the result to this file too")
    args = parser.parse_args()
    if args.repeats < 1 or min(args.rows) < 1:
        parser.error("--repeats and --rows must be at least 1")
    if args.guided and any(rows % 2 for rows in args.rows):
        parser.error("--rows must be even with --guided")
    return args


def make(name: str, steps: str, device: str) -> nn.Module:
    h = HEADS[name]
    sizes = {"target_channels": h.channels, "z_channels": h.z, "depth": h.depth, "width": h.width}
    extra = {"vae_scale": 0.107} if name == "dcar" else {}
    return randomise(h.kind(**sizes, num_sampling_steps=steps, **extra)).eval().to(device)


def measure(name: str, head: nn.Module, rows: int, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compares, then times original and patched in turns."""
    cfg = HEADS[name].guidance if args.guided else 1.0
    z = torch.randn(rows, HEADS[name].z, generator=torch.Generator().manual_seed(1)).to(args.device)
    error = check(name, head, z, cfg, dtype, args)
    heads = {"original": head, "patched": copy.deepcopy(head)}
    patch_diffloss(heads["patched"], rng=args.rng)
    seconds: dict[str, list[float]] = {which: [] for which in heads}
    with precision(args.device, dtype):
        for turn in range(args.repeats + 1):
            for which, one in heads.items():
                took = timed(one, z, cfg)
                if turn:  # the first one warms up, and packs
                    seconds[which].append(took)
    medians = {which: statistics.median(found) for which, found in seconds.items()}
    return {
        "head": name,
        "rows": rows,
        "steps": head.gen_diffusion.num_timesteps,
        "guidance": cfg,
        "dtype": dtype,
        "rng": args.rng,
        "error": error,
        "seconds": seconds,
        "median_s": medians,
        "ratio": medians["original"] / medians["patched"],
    }


@torch.no_grad()
def timed(head: nn.Module, z: Tensor, cfg: float) -> float:
    synchronise(z)
    start = time.perf_counter()
    head.sample(z, 1.0, cfg)
    synchronise(z)
    return time.perf_counter() - start


def synchronise(z: Tensor) -> None:
    if z.is_cuda:
        torch.cuda.synchronize(z.device)


@torch.no_grad()
def check(name: str, timed_head: nn.Module, z: Tensor, cfg: float, dtype: str, args: argparse.Namespace) -> float:
    """The largest difference over the largest value; ``Failure`` if patched is not what the original is."""
    head = make(name, HEADS[name].parity, args.device)
    head.load_state_dict(timed_head.state_dict())
    few = z[: min(len(z), 64)]

    def run(fast: bool, exact: bool = False) -> Tensor:
        torch.manual_seed(3)
        with precision(args.device, "float32" if exact else dtype):
            with patch_diffloss(head) if fast else contextlib.nullcontext():
                return head.sample(few, 0.9, cfg)

    truth, original, patched = run(False, exact=True), run(False), run(True)
    largest = truth.abs().max().item()
    if dtype == "float32":
        error = (patched - original).abs().max().item() / largest
        allowed = TOLERANCE
    else:
        error = (patched - truth).abs().max().item() / largest
        allowed = BFLOAT16_FACTOR * (original - truth).abs().max().item() / largest + 2**-8
    if not error <= allowed:
        raise Failure(f"{name}, {dtype}: patched samples are off by {error:.3g}, {allowed:.3g} is allowed")
    return error


@contextlib.contextmanager
def precision(device: str, dtype: str) -> Iterator[None]:
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
        yield


def show(result: dict[str, Any]) -> None:
    medians = result["median_s"]
    times = f"{duration(medians['original'])} -> {duration(medians['patched'])}"
    note(f"{result['head']} {result['rows']} rows {result['dtype']}: {times} ({result['ratio']:.2f}x)")


def columns(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["head", "rows", "steps", "guidance", "dtype", "original", "patched", "ratio", "error"]
    lines = [
        [
            r["head"],
            str(r["rows"]),
            str(r["steps"]),
            f"{r['guidance']:g}",
            r["dtype"],
            duration(r["median_s"]["original"]),
            duration(r["median_s"]["patched"]),
            f"{r['ratio']:.2f}x",
            f"{r['error']:.1e}",
        ]
        for r in results
    ]
    return header, lines


if __name__ == "__main__":
    main()
