"""Command lines of the benchmarks, checked before any work."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from _report import note
from _work import DTYPES, FAST_DTYPES, KINDS, RowSpec, Workload

PRESETS = ("shapes", "dc-ar-256", "dc-ar-512", "dc-ar-1024")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PROMPT_TOKENS = 64
ROW_FORMS = "eager[-DTYPE], compile[-DTYPE][:MODE], fast[-DTYPE] and fast-fp8"
CPU_ROWS = ("eager-float32", "eager-bfloat16", "fast-float32", "fast-bfloat16")
GPU_ROWS = (*CPU_ROWS, "compile-bfloat16:max-autotune")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in low..high."""
    allowed = f"an integer >= {low}" if high is None else f"an integer in {low}..{high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return parse


def add_workload_arguments(parser: argparse.ArgumentParser, batch: int) -> None:
    """The arguments that say what is computed."""
    parser.add_argument("--bs", type=integer(1), default=batch, metavar="N", help="images per batch (%(default)s)")
    parser.add_argument("--steps", type=integer(1, 256), default=12, metavar="N", help="unmasking steps (%(default)s)")
    parser.add_argument("--height", type=integer(1), metavar="PX", help="image height (the preset's)")
    parser.add_argument("--width", type=integer(1), metavar="PX", help="image width (the preset's)")
    parser.add_argument(
        "--prompt-tokens", type=integer(1), default=PROMPT_TOKENS, metavar="N", help="prompt length (%(default)s)"
    )


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        metavar="FOLDER",
        help="a saved pipeline of the preset's sizes; if there is none, random weights are drawn and saved there "
        "(default: they are drawn anew and not kept)",
    )


def check_size(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Any, tuple[int, int]]:
    """The preset's PipelineConfig and the (h, w) grid; fills in height and width."""
    from dcar_fast.config import preset

    config = preset(args.preset)
    factor = config.tokenizer.compression
    for name in ("height", "width"):
        value = getattr(args, name)
        if value is None:
            setattr(args, name, config.image_size)
        elif value % factor:
            parser.error(f"argument --{name}: must be a multiple of {factor} for {args.preset}, got {value}")
    if args.prompt_tokens > config.text.max_length:
        limit = config.text.max_length
        parser.error(f"argument --prompt-tokens: {args.preset} takes at most {limit}, got {args.prompt_tokens}")
    return config, (args.height // factor, args.width // factor)


def check_output(parser: argparse.ArgumentParser, name: str, path: Path | None) -> None:
    """A result that cannot be written is an error before the work, not after it."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        parser.error(f"argument {name}: cannot write {path}")


# ---- arguments of the timed benchmarks


@dataclass
class Settings:
    """A checked command line."""

    benchmark: str
    work: Workload
    rows: list[RowSpec]
    repeats: int | None
    warmup: int | None
    json: Path | None
    trace: Path | None  # where torch's profiler leaves its trace
    marked: str | None  # "range": what is timed is marked for Nsight; "stages": and its stages
    weights: str | None  # folder of a pipeline
    command: str
    config: Any  # dcar_fast.config.PipelineConfig
    grid: tuple[int, int]


def parse(benchmark: str, batch: int, description: str, arguments: Sequence[str] | None) -> Settings:
    """Command line -> Settings; a bad one exits with code 2 and one line."""
    parser = Parser(prog=f"{benchmark}.py", description=description)
    parser.add_argument("--preset", choices=PRESETS, help="default: dc-ar-512 on a GPU, shapes without")
    add_workload_arguments(parser, batch)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="only rows of this dtype")
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help=f"{ROW_FORMS} with DTYPE in float32, bfloat16, float16 and MODE in {', '.join(COMPILE_MODES)}; eager: the "
        "reference (in float32 what the released code runs), compile: the same through torch.compile, fast: what "
        "users get, fast-fp8: the same with float8, on GPUs that have it; default: "
        f"{' '.join(CPU_ROWS)}, on a GPU also {GPU_ROWS[-1]}",
    )
    parser.add_argument(
        "--compile-mode", choices=COMPILE_MODES, help="for compile rows without :MODE (GPU: max-autotune, CPU: default)"
    )
    add_weights_argument(parser)
    parser.add_argument("--repeats", type=integer(1), metavar="N", help="timed runs per row (chosen by their length)")
    parser.add_argument(
        "--warmup",
        type=integer(0),
        metavar="N",
        help="runs per row before (3 on a GPU, 1 on a CPU, 0 for full size there)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON line to this file")
    add_profile_arguments(parser, benchmark)
    args = parser.parse_args(arguments)
    check_output(parser, "--json", args.json)
    check_output(parser, "--profile", args.profile)

    device = check_device(parser, args.device)
    args.preset = args.preset or ("dc-ar-512" if device != "cpu" else "shapes")
    config, grid = check_size(parser, args)
    work = Workload(args.preset, args.bs, args.height, args.width, args.steps, args.prompt_tokens, device)
    rows = choose_rows(parser, args, device)
    marked = "stages" if args.nvtx else "range" if args.profile_range else None
    if marked is not None:
        check_marks(parser, "--nvtx" if args.nvtx else "--profile-range", rows, device)
    # options that change the work but have no field of their own in the result
    name = benchmark if args.prompt_tokens == PROMPT_TOKENS else f"{benchmark} --prompt-tokens {args.prompt_tokens}"
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--json" in given:  # where the result went changes nothing in it
        del given[given.index("--json") : given.index("--json") + 2]
    command = shlex.join(["python", f"benchmarks/{benchmark}.py", *given])
    return Settings(
        name,
        work,
        rows,
        args.repeats,
        args.warmup,
        args.json,
        args.profile,
        marked,
        args.weights,
        command,
        config,
        grid,
    )


def add_profile_arguments(parser: argparse.ArgumentParser, benchmark: str) -> None:
    parser.add_argument(
        "--profile",
        nargs="?",
        type=Path,
        const=Path(f"{benchmark}-trace.json.gz"),
        metavar="FILE.json.gz",
        help="after the timed runs, write a trace of torch's profiler (%(const)s) over two more runs of the last fast "
        "row, else of the last row, and print what took longest",
    )
    parser.add_argument(
        "--profile-range",
        action="store_true",
        help="for nsys and ncu: run the one row in this process and let them collect its timed runs alone",
    )
    parser.add_argument(
        "--nvtx",
        action="store_true",
        help="the same with every stage marked, without CUDA graphs: in what they replay no stage is seen",
    )


def check_marks(parser: argparse.ArgumentParser, option: str, rows: list[RowSpec], device: str) -> None:
    """What is collected is one row on a GPU."""
    if device == "cpu":
        parser.error(f"argument {option}: Nsight sees GPUs only, and this runs on the CPU; --profile works there")
    if len(rows) != 1:
        parser.error(f"argument {option}: needs one row, such as --rows fast-bfloat16, got {len(rows)}")


def check_device(parser: argparse.ArgumentParser, device: str | None) -> str:
    import torch

    available = torch.cuda.is_available()
    if device is None:
        return "cuda" if available else "cpu"
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (index and not index.isdigit()) or device.endswith(":")):
        parser.error(f"argument --device: must be cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and not available:
        parser.error(f"argument --device: {device} was asked for, but torch {torch.__version__} sees no GPU here")
    if index and int(index) >= torch.cuda.device_count():
        parser.error(f"argument --device: {device} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return device


def choose_rows(parser: argparse.ArgumentParser, args: argparse.Namespace, device: str) -> list[RowSpec]:
    """The rows of --rows, or those of the device, of --dtype where that is given."""
    names = args.rows
    if names is None:
        names = list(CPU_ROWS if device == "cpu" else GPU_ROWS)
        if args.dtype is not None:
            names = list(dict.fromkeys(re.sub("-b?float[0-9]+", "", name) for name in names))
        if device == "cpu":
            note(
                "torch.compile takes minutes on a CPU: name a row for it, such as --rows eager-float32 compile-float32"
            )
    default_mode = args.compile_mode or ("default" if device == "cpu" else "max-autotune")
    rows: list[RowSpec] = []
    for name in names:
        row = parse_row(parser, name, args.dtype, default_mode)
        if row in rows:
            parser.error(f"argument --rows: {row.name} is named twice")
        rows.append(row)
    return rows


def parse_row(parser: argparse.ArgumentParser, name: str, only: str | None, default_mode: str) -> RowSpec:
    """KIND[-DTYPE][:MODE]; ``only``: the one dtype that is allowed."""
    base, colon, mode = name.partition(":")
    kind, dash, dtype = base.partition("-")
    dtypes = FAST_DTYPES if kind == "fast" else DTYPES
    if kind not in KINDS or (dash and dtype not in dtypes) or (colon and mode not in COMPILE_MODES):
        parser.error(f"argument --rows: unknown row {name!r}; rows are {ROW_FORMS}")
    if colon and kind != "compile":
        parser.error(f"argument --rows: {name!r} names a compile mode for a row of kind {kind}")
    if only is not None and dtype not in ("", only):
        parser.error(f"argument --rows: {name!r} contradicts --dtype {only}")
    mode = (mode or default_mode) if kind == "compile" else ""
    return RowSpec(kind, dtype or only or "float32", mode)
