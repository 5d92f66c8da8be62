"""FLOPs, bytes and the least possible time of every stage: ``python benchmarks/roofline.py --gpu h200 --png FILE``.

``--measured RESULT.json`` sets what latency.py or throughput.py measured beside it.

Computed from the model's own shapes (dcar_fast/flops.py), nothing is run. The floor of a stage adds, operation by
operation, the longer of FLOPs / ceiling and bytes / bandwidth. It is the floor of the reference's arithmetic: leaving
work out that does not change the result goes below it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from _arguments import PRESETS, Parser, add_workload_arguments, check_output, check_size
from _report import Failure, note, table
from _roofline import (
    BYTE_UNITS,
    ELEMENT_SIZE,
    FLOP_UNITS,
    GPUS,
    LABELS,
    SECOND_UNITS,
    Ceiling,
    Measured,
    Stage,
    quantity,
    summarise,
    unit_of,
)
from compare import check_result
from results_table import timed

from dcar_fast import flops
from dcar_fast.config import SamplingConfig


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def print_table(stages: list[Stage], whole: Stage) -> None:
    work, work_unit = unit_of(whole.flops, FLOP_UNITS)
    data, data_unit = unit_of(whole.bytes, BYTE_UNITS)
    time, time_unit = unit_of(whole.floor, SECOND_UNITS)
    lines = [
        [
            stage.name,
            f"{stage.flops / work:.4g}",
            f"{stage.bytes / data:.4g}",
            f"{stage.flops / stage.bytes:.4g}",
            f"{stage.floor / time:.3g}",
            f"{stage.floor / whole.floor:.1%}",
            f"{stage.memory_bound / stage.floor:.0%}",
        ]
        for stage in (*stages, whole)
    ]
    print(table(["stage", work_unit, data_unit, "FLOP/byte", f"floor {time_unit}", "share", "memory-bound"], lines))


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="roofline.py", description="FLOPs, bytes and floors per stage, from the shapes alone.")
    parser.add_argument("--preset", choices=PRESETS, default="dc-ar-512", help="default: %(default)s")
    parser.add_argument("--gpu", choices=GPUS, help="default: h200, or the one that --measured ran on")
    add_workload_arguments(parser, batch=1)
    parser.add_argument("--dtype", choices=ELEMENT_SIZE, help="default: bfloat16, or that of the measured row")
    parser.add_argument("--tflops", type=positive, metavar="T", help="compute ceiling in TFLOP/s, instead of the GPU's")
    parser.add_argument("--bandwidth", type=positive, metavar="TB", help="memory ceiling in TB/s, instead of the GPU's")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw it (needs matplotlib)")
    parser.add_argument(
        "--measured", type=Path, metavar="RESULT.json", help="a result whose work is taken, and set beside the floors"
    )
    parser.add_argument("--row", metavar="ROW", help="of that result; default: the last fast row, else the last")
    args = parser.parse_args(arguments)
    check_output(parser, "--png", args.png)
    measured = take_measured(parser, args) if args.measured is not None else None
    args.dtype, named = args.dtype or "bfloat16", args.gpu
    args.gpu = args.gpu or "h200"
    draw = drawing(parser) if args.png is not None else None
    config, grid = check_size(parser, args)

    gpu, size = GPUS[args.gpu], ELEMENT_SIZE[args.dtype]
    compute = Ceiling(args.tflops * 1e12, "given") if args.tflops else gpu.half if size == 2 else gpu.single
    memory = Ceiling(args.bandwidth * 1e12, "given") if args.bandwidth else gpu.memory
    sampling = SamplingConfig(num_steps=args.steps)
    ops = flops.generation(config, sampling, batch=args.bs, grid=grid, prompt_tokens=args.prompt_tokens)
    rates = size, compute.rate, memory.rate
    stages = [summarise(LABELS[name], ops[name], *rates) for name in LABELS]
    whole = summarise("all", [op for stage in ops.values() for op in stage], *rates)
    encoder = summarise("encoder", flops.encoder(config.tokenizer, args.bs, *grid), *rates)

    work = (
        f"{args.preset}, {args.width} x {args.height} px, batch {args.bs}, {args.steps} steps, "
        f"prompt of {args.prompt_tokens} tokens, {args.dtype}"
    )
    given = args.tflops and args.bandwidth and not named
    ceilings = (
        f"{'ceilings' if given else gpu.name}: {compute.rate / 1e12:.4g} TFLOP/s ({compute.source}), "
        f"{memory.rate / 1e12:.3g} TB/s ({memory.source})"
    )
    print(f"{work}\n{ceilings}\n")
    print_table(stages, whole)
    print("\nfloor: the longer of FLOPs / ceiling and bytes / bandwidth of every operation, one after the other")
    print(f"memory-bound: share of the floor; at most {args.bs / whole.floor:.4g} images/s")
    print("the unmasking steps are text keys, values + trunk + logits")
    print(
        f"not in the table, tokenising the same number of images: {quantity(encoder.flops, FLOP_UNITS)}, "
        f"{quantity(encoder.floor, SECOND_UNITS)}"
    )
    if measured is not None:
        print(f"\nmeasured: {measured.source}: {quantity(measured.seconds, SECOND_UNITS)}, ", end="")
        print(f"{measured.seconds / whole.floor:.3g} times the floor")
        print_measured(measured, dict(zip(LABELS, stages, strict=True)))
    if draw is not None:
        draw(args.png, ops, stages, whole, args.bs, work, ceilings, rates, measured)
        note(f"wrote {args.png}")
    return 0


def take_measured(parser: Parser, args: argparse.Namespace) -> Measured:
    """The row that is compared; the work, dtype and GPU of its run go into ``args``."""
    try:
        found = timed(json.loads(args.measured.read_text(encoding="utf-8")))
        if not found:
            raise Failure(f"{args.measured} holds no result of latency.py or throughput.py")
        result = found[0]
        check_result(args.measured, result)
    except (OSError, ValueError, Failure) as error:
        parser.error(f"argument --measured: {error}")
    rows = {row["name"]: row for row in result["rows"] if "unavailable" not in row}
    if not rows:
        parser.error(f"argument --measured: nothing was measured in {args.measured}")
    name = args.row or ([name for name in rows if name.startswith("fast")] or list(rows))[-1]
    if name not in rows:
        parser.error(f"argument --row: {args.measured} has {', '.join(rows)}, not {name!r}")
    args.preset, args.bs, args.steps = result["preset"], result["batch"], result["steps"]
    args.height, args.width = result["height"], result["width"]
    prompt = result["benchmark"].partition("--prompt-tokens ")[2]
    args.prompt_tokens = int(prompt) if prompt else args.prompt_tokens
    args.dtype = args.dtype or rows[name]["dtype"]
    if args.dtype not in ELEMENT_SIZE:
        parser.error(f"argument --row: {name} has parts in several precisions, of which no floor is known")
    fitting = [key for key, gpu in GPUS.items() if gpu.name.split()[0] in result["device"]]
    args.gpu = args.gpu or (fitting[0] if fitting else None)
    if args.gpu is None and not (args.tflops and args.bandwidth):
        parser.error(
            f"argument --measured: it ran on {result['device']}, whose ceilings are not known here: "
            "--tflops and --bandwidth, as ceilings.py measures them"
        )
    return Measured.of(result, rows[name])


def print_measured(measured: Measured, floors: dict[str, Stage]) -> None:
    """Every measured stage beside its floor; that of the unmasking steps is the floor of three."""
    lines = []
    for name, (seconds, what) in measured.lanes.items():
        parts = ("text_projection", "trunk", "logits") if what else (name,)
        floor = sum(floors[part].floor for part in parts)
        label = "unmasking steps" if what else LABELS[name]
        cells = (quantity(value, SECOND_UNITS) for value in (floor, seconds))
        lines.append([label, *cells, f"{seconds / floor:.3g}x"])
    print(table(["stage", "floor", "measured", "times"], lines))


def drawing(parser: Parser) -> Callable[..., None]:
    """The function that draws; an error of one line if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        parser.error("argument --png: needs matplotlib, which is not installed (pip install matplotlib)")
    matplotlib.use("Agg")
    from _roofline_png import Picture, draw

    return lambda path, *values: draw(path, Picture(*values))


if __name__ == "__main__":
    sys.exit(main())
