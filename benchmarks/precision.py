"""What lower precision and the fast engine change, against the float32 reference: ``python benchmarks/precision.py``.

One prompt batch and one list of seeds; everything draws the same noise. For every row:

step: share of the open tokens that get the reference's id when the row samples from the reference's ids of that step.
free: share of all tokens that are equal when the row samples from its prompts to the end, where differences feed on
themselves. residual: error of the diffusion head's output after the reference's last ids. PSNR of pixels: "tokens" of
the reference's tokens, decoded by the row; "free" of the row's own image.

fast-fp8 multiplies qkv, fc1 and fc2 of every block in float8, the rest in bfloat16; on a device without float8 the same
numbers are multiplied in float32, and the report says so. Random weights by default: their logits are flatter than a
trained model's, so that more tokens flip. The last line is the result as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from _arguments import (
    PRESETS,
    PROMPT_TOKENS,
    Parser,
    add_weights_argument,
    add_workload_arguments,
    check_device,
    check_output,
    check_size,
)
from _report import commit, environment, note, table, threads
from _work import DTYPES, FAST_DTYPES, Workload

ROWS = ("eager-bfloat16", "eager-float16", "fast-float32", "fast-bfloat16", "fast-float16", "fast-fp8")
RUN = 31  # index of the prompts and seeds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="precision.py", description="Agreement of every precision with the float32 reference.")
    parser.add_argument("--preset", choices=PRESETS, default="shapes", help="default: %(default)s, random weights")
    add_weights_argument(parser)
    add_workload_arguments(parser, batch=2)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help=f"default: {' '.join(ROWS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON line to this file")
    args = parser.parse_args(arguments)
    check_output(parser, "--json", args.json)
    check_rows(parser, args.rows)
    device = check_device(parser, args.device)
    _, grid = check_size(parser, args)
    work = Workload(args.preset, args.bs, args.height, args.width, args.steps, args.prompt_tokens, device)

    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows, trained = measure(work, grid, args.rows, args.weights)
    kind = str(args.weights) if trained else "random"
    print_rows(work, rows, kind)
    line = json.dumps(
        {
            "benchmark": "precision" if args.prompt_tokens == PROMPT_TOKENS else f"precision {args.prompt_tokens}",
            "preset": work.preset,
            "weights": kind,
            "batch": work.batch,
            "height": work.height,
            "width": work.width,
            "steps": work.steps,
            "device": device_of(device),
            "rows": rows,
            "versions": environment(device),
            "commit": commit(),
            "time": started,
            "threads": threads(device),
        }
    )
    if args.json is not None:
        from dcar_fast._files import write_atomically

        write_atomically(args.json, lambda path: path.write_text(line + "\n"))
    print(f"\n{line}")
    return 0


def check_rows(parser: Parser, names: Sequence[str]) -> None:
    """The reference is no row, and neither is what compiles."""
    for name in names:
        kind, _, dtype = name.partition("-")
        if kind not in ("eager", "fast") or dtype not in (DTYPES if kind == "eager" else FAST_DTYPES):
            parser.error(f"argument --rows: unknown row {name!r}; rows are eager-DTYPE, fast-DTYPE and fast-fp8")
        if name == "eager-float32":
            parser.error(f"argument --rows: {name!r} is the reference itself")
        if list(names).count(name) > 1:
            parser.error(f"argument --rows: {name} is named twice")


def device_of(device: str) -> str:
    import torch
    from _session import device_name

    return device_name(torch.device(device))


def measure(
    work: Workload, grid: tuple[int, int], names: Sequence[str], folder: str | None
) -> tuple[list[dict[str, Any]], bool]:
    """A dictionary per row, one pipeline in memory at a time; and whether its weights are trained."""
    from _precision import Reference, compare
    from _weights import weights

    with weights(work.preset, folder) as found:
        note("the float32 reference")
        reference = Reference(found, work, grid, RUN)
        rows = []
        for name in names:
            note(name)
            rows.append({"name": name, **compare(reference, *name.split("-"))})
    return rows, reference.trained


def print_rows(work: Workload, rows: list[dict[str, Any]], weights: str) -> None:
    size = f"{work.preset}, {work.width} x {work.height} px, batch {work.batch}, {work.steps} steps"
    print(f"precision: {size}, prompt of {work.prompt_tokens} tokens, {weights} weights")
    print("against eager-float32, the same seeds\n")
    header = ["row", "step, mean", "least", "free", "residual max", "rms", "relative", "PSNR tokens", "free"]
    lines = []
    for row in rows:
        steps, residual = row["step_agreement"], row["residual"]
        lines.append(
            [
                row["name"],
                f"{statistics.fmean(steps):.2%}",
                f"{min(steps):.2%}",
                f"{row['free_agreement']:.2%}",
                *(f"{residual[key]:.2e}" for key in ("max", "rms", "relative")),
                *(decibels(row[key]) for key in ("psnr_tokens", "psnr_free")),
            ]
        )
    print(table(header, lines))
    for row in rows:
        if row["emulated"]:
            print(f"{row['name']} is emulated in plain PyTorch: {row['emulated']}")
    print("\nper step:")
    print(
        table(
            ["step", *(row["name"] for row in rows)],
            [[str(s), *(f"{row['step_agreement'][s]:.2%}" for row in rows)] for s in range(work.steps)],
        )
    )
    print("\nrelative: rms of the error by the rms of the residuals; step and free: shares of equal token ids")


def decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"


if __name__ == "__main__":
    sys.exit(main())
