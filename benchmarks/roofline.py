"""FLOPs, bytes and the least possible time of every stage: ``python benchmarks/roofline.py --gpu h200 --png FILE``.

Computed from the model's own shapes (dcar_fast/flops.py), nothing is run. The floor of a stage adds, operation by
operation, the longer of FLOPs / ceiling and bytes / bandwidth. It is the floor of the reference's arithmetic: leaving
work out that does not change the result goes below it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from _arguments import PRESETS, Parser, add_workload_arguments, check_output, check_size
from _report import note, table

from dcar_fast import flops
from dcar_fast._files import write_atomically
from dcar_fast.config import SamplingConfig

ELEMENT_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
LABELS = {
    "text": "text encoder",
    "text_projection": "text keys, values",
    "trunk": "trunk",
    "logits": "logits",
    "head": "diffusion head",
    "decode": "decoder",
}
FLOP_UNITS = ((1e6, "MFLOP"), (1e9, "GFLOP"), (1e12, "TFLOP"), (1e15, "PFLOP"))
BYTE_UNITS = ((1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
SECOND_UNITS = ((1e-6, "us"), (1e-3, "ms"), (1.0, "s"))
COLOURS = dict(zip(LABELS, ("#CC79A7", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#D55E00"), strict=True))


@dataclass(frozen=True)
class Ceiling:
    """A rate per second and where it comes from: "measured", "datasheet" or "given"."""

    rate: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """Ceilings of one GPU: dense 16-bit and float32 (without TF32) FLOP/s, memory bytes/s.

    Measured: a large bfloat16 product of random matrices, and a device-to-device copy counting reads and writes.
    """

    name: str
    half: Ceiling
    single: Ceiling
    memory: Ceiling


GPUS = {
    "h200": Gpu("H200", Ceiling(790e12, "measured"), Ceiling(67e12, "datasheet"), Ceiling(4.3e12, "measured")),
    "h100": Gpu("H100 SXM", Ceiling(798e12, "measured"), Ceiling(67e12, "datasheet"), Ceiling(3.0e12, "measured")),
    "a100": Gpu("A100 SXM", Ceiling(312e12, "datasheet"), Ceiling(19.5e12, "datasheet"), Ceiling(2.0e12, "datasheet")),
}


@dataclass(frozen=True)
class Stage:
    """Sums of one stage: FLOPs, bytes, floor in seconds, and the part of the floor that is bound by memory."""

    name: str
    flops: int
    bytes: int
    floor: float
    memory_bound: float


def summarise(name: str, ops: list[flops.Op], size: int, compute: float, memory: float) -> Stage:
    total = flops.floor(ops, size, compute, memory)
    bound = [op for op in ops if op.flops / compute < (op.weights + op.activations) * size / memory]
    return Stage(name, flops.flops(ops), flops.moved(ops, size), total, flops.floor(bound, size, compute, memory))


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def unit_of(largest: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The (factor, name) among ``units`` (ascending) in which ``largest`` is at least 1, or the first."""
    return next(((f, name) for f, name in reversed(units) if largest >= f), units[0])


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


def quantity(value: float, units: Sequence[tuple[float, str]]) -> str:
    factor, name = unit_of(value, units)
    return f"{value / factor:.3g} {name}"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="roofline.py", description="FLOPs, bytes and floors per stage, from the shapes alone.")
    parser.add_argument("--preset", choices=PRESETS, default="dc-ar-512", help="default: %(default)s")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="default: %(default)s")
    add_workload_arguments(parser, batch=1)
    parser.add_argument("--dtype", choices=ELEMENT_SIZE, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--tflops", type=positive, metavar="T", help="compute ceiling in TFLOP/s, instead of the GPU's")
    parser.add_argument("--bandwidth", type=positive, metavar="TB", help="memory ceiling in TB/s, instead of the GPU's")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw it (needs matplotlib)")
    args = parser.parse_args(arguments)
    check_output(parser, "--png", args.png)
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
    ceilings = (
        f"{gpu.name}: {compute.rate / 1e12:.4g} TFLOP/s ({compute.source}), "
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
    if draw is not None:
        draw(args.png, ops, stages, whole, args.bs, work, ceilings, rates)
        note(f"wrote {args.png}")
    return 0


def drawing(parser: Parser) -> Callable[..., None]:
    """The function that draws; an error of one line if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        parser.error("argument --png: needs matplotlib, which is not installed (pip install matplotlib)")
    matplotlib.use("Agg")
    return draw_png


def draw_png(
    path: Path,
    ops: dict[str, list[flops.Op]],
    stages: list[Stage],
    whole: Stage,
    batch: int,
    work: str,
    ceilings: str,
    rates: tuple[int, float, float],
) -> None:
    """Above: the roofline with the stages on it, and the totals. Below, one lane per stage: every operation's FLOP per
    byte (area: time), and the stage's floor."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    size, compute, memory = rates
    ridge = compute / memory
    ink, grey, light = "#20242a", "#7b828c", "#e8eaed"
    style = {"font.size": 12, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": grey}
    style |= {"xtick.color": ink, "ytick.color": ink, "hatch.linewidth": 1.4, "font.family": "DejaVu Sans"}

    def intensity(op: flops.Op) -> float:
        return op.flops / ((op.weights + op.activations) * size)

    def share(op: flops.Op) -> float:
        return flops.floor([op], *rates) / whole.floor

    with plt.rc_context(style):
        figure = plt.figure(figsize=(14, 8.6), dpi=140)
        grid = figure.add_gridspec(
            2, 2, height_ratios=(1, 1.35), left=0.125, right=0.975, top=0.845, bottom=0.085, hspace=0.16, wspace=0.06
        )
        roof, totals = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        lanes = figure.add_subplot(grid[1, 0], sharex=roof)
        bars = figure.add_subplot(grid[1, 1], sharey=lanes)
        figure.text(0.018, 0.955, "What one batch must cost", fontsize=20, weight="bold", va="center")
        figure.text(0.018, 0.91, f"{work}   |   {ceilings}", fontsize=12, color=grey, va="center")

        every = [intensity(op) for stage in ops.values() for op in stage]
        low, high = min(every) / 1.8, max(*every, ridge) * 2.2
        for axis in (roof, lanes):
            axis.axvspan(low, ridge, color="#f3f4f6", lw=0, zorder=0)
            axis.axvline(ridge, color=grey, lw=1, ls=(0, (4, 3)), zorder=1)
        roof.plot([low, ridge, high], [low * memory, compute, compute], color=ink, lw=2.2, zorder=2)
        for name, stage in zip(ops, stages, strict=True):
            roof.scatter(
                stage.flops / stage.bytes,
                stage.flops / stage.floor,
                s=110,
                marker="D",
                color=COLOURS[name],
                edgecolors="white",
                lw=1.3,
                zorder=4,
            )
        slowest = min(stage.flops / stage.floor for stage in stages)
        roof.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(slowest / 4, compute / 12), compute * 2.4))
        roof.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        roof.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1e12:g}"))
        roof.yaxis.set_minor_formatter(NullFormatter())
        roof.set_ylabel("TFLOP/s within reach")
        roof.tick_params(labelbottom=False)
        roof.text(ridge / 1.12, compute * 1.55, "bound by memory", ha="right", va="center", color=grey)
        roof.text(ridge * 1.12, compute * 1.55, "bound by arithmetic", ha="left", va="center", color=grey)

        note_at = {"transform": roof.transAxes, "ha": "right", "va": "center", "fontsize": 10, "color": grey}
        note_at["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        roof.text(0.985, 0.07, "diamonds: whole stages, coloured as below", **note_at)

        for i, (name, parts) in enumerate(ops.items()):
            lanes.axhline(i, color=light, lw=1, zorder=1)
            for op in parts:
                area = 22 + 2600 * share(op)
                lanes.scatter(intensity(op), i, s=area, color=COLOURS[name], alpha=0.6, lw=0, zorder=3)
            longest = max(parts, key=share)
            below = i + 0.2 + 0.9 * share(longest) ** 0.5
            lanes.text(intensity(longest), below, longest.name, fontsize=9.5, color=grey, va="center", ha="center")
        lanes.set_xlabel("FLOP per byte moved (dots: operations, area: time; the longest is named)")
        lanes.set_yticks(range(len(stages)), [stage.name for stage in stages], fontsize=13)
        lanes.set_ylim(len(stages) - 0.35, -0.6)
        lanes.tick_params(axis="y", length=0)

        factor, unit = unit_of(whole.floor, SECOND_UNITS)
        longest = max(stage.floor for stage in stages) / factor
        for i, (name, stage) in enumerate(zip(ops, stages, strict=True)):
            total, bound = stage.floor / factor, stage.memory_bound / factor
            bars.barh(i, total - bound, color=COLOURS[name], height=0.56)
            bars.barh(
                i, bound, left=total - bound, color=COLOURS[name], height=0.56, hatch="///", edgecolor="white", lw=0
            )
            bars.text(total + longest * 0.02, i - 0.12, f"{total:.3g} {unit}", va="center", fontsize=13, weight="bold")
            detail = f"{stage.floor / whole.floor:.1%},  {quantity(stage.flops, FLOP_UNITS)}"
            bars.text(total + longest * 0.02, i + 0.17, detail, va="center", fontsize=10, color=grey)
        bars.set_xlim(0, longest * 1.3)
        bars.set_xlabel(f"least time in {unit} (hatched: operations bound by memory)")
        bars.tick_params(axis="y", labelleft=False, length=0)

        totals.axis("off")
        rate = batch / whole.floor
        numbers = (
            (quantity(whole.floor, SECOND_UNITS), "least time"),
            (f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}", "images/s at most"),
            (quantity(whole.flops, FLOP_UNITS), "arithmetic"),
            (quantity(whole.bytes, BYTE_UNITS), "moved"),
        )
        for i, (value, label) in enumerate(numbers):
            x, y = 0.1 + 0.47 * (i % 2), 0.78 - 0.5 * (i // 2)
            totals.text(x, y, value, fontsize=26, weight="bold", va="center", transform=totals.transAxes)
            totals.text(x, y - 0.16, label, fontsize=13, color=grey, va="center", transform=totals.transAxes)

        for axis in (roof, lanes, bars):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="x", which="major", color=light, lw=0.9, zorder=0)
            axis.set_axisbelow(True)
        lanes.spines["left"].set_visible(False)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
