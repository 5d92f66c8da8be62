"""Command lines of the benchmarks, checked before any work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from _report import note

PRESETS = ("shapes", "dc-ar-256", "dc-ar-512", "dc-ar-1024")
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("eager", "compile")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PROMPT_TOKENS = 64


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
    work: Any  # _session.Workload
    rows: list[Any]  # _session.RowSpec
    repeats: int | None
    warmup: int | None
    json: Path | None
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
        help="eager[-DTYPE] and compile[-DTYPE][:MODE] with DTYPE in float32 (eager: what the released code runs), "
        f"bfloat16, float16 and MODE in {', '.join(COMPILE_MODES)}; "
        "default: eager-float32 eager-bfloat16, on a GPU also compile-bfloat16",
    )
    parser.add_argument(
        "--compile-mode", choices=COMPILE_MODES, help="for compile rows without :MODE (GPU: max-autotune, CPU: default)"
    )
    parser.add_argument("--repeats", type=integer(1), metavar="N", help="timed runs per row (chosen by their length)")
    parser.add_argument(
        "--warmup",
        type=integer(0),
        metavar="N",
        help="runs per row before (3 on a GPU, 1 on a CPU, 0 for full size there)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON line to this file")
    args = parser.parse_args(arguments)
    check_output(parser, "--json", args.json)

    device = check_device(parser, args.device)
    args.preset = args.preset or ("dc-ar-512" if device != "cpu" else "shapes")
    config, grid = check_size(parser, args)
    from _session import Workload

    work = Workload(args.preset, args.bs, args.height, args.width, args.steps, args.prompt_tokens, device)
    rows = choose_rows(parser, args, device)
    # options that change the work but have no field of their own in the result
    name = benchmark if args.prompt_tokens == PROMPT_TOKENS else f"{benchmark} --prompt-tokens {args.prompt_tokens}"
    return Settings(name, work, rows, args.repeats, args.warmup, args.json, config, grid)


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


def choose_rows(parser: argparse.ArgumentParser, args: argparse.Namespace, device: str) -> list[Any]:
    from _session import RowSpec

    default_mode = "default" if device == "cpu" else "max-autotune"
    names = args.rows
    if names is None:
        names = ["eager-float32", "eager-bfloat16"] if args.dtype is None else ["eager"]
        if device != "cpu":
            names.append(f"compile-{args.dtype or 'bfloat16'}")
        else:
            note(
                "torch.compile takes minutes on a CPU: name a row for it, such as --rows eager-float32 compile-float32"
            )
    rows = []
    for name in names:
        base, colon, mode = name.partition(":")
        kind, dash, dtype = base.partition("-")
        if kind not in KINDS or (dash and dtype not in DTYPES) or (colon and mode not in COMPILE_MODES):
            parser.error(f"argument --rows: unknown row {name!r}; rows are eager[-DTYPE] and compile[-DTYPE][:MODE]")
        if colon and kind == "eager":
            parser.error(f"argument --rows: {name!r} names a compile mode for an eager row")
        if args.dtype is not None and dtype not in ("", args.dtype):
            parser.error(f"argument --rows: {name!r} contradicts --dtype {args.dtype}")
        if kind == "compile":
            mode = mode or args.compile_mode or default_mode
        suffix = f":{mode}" if mode not in ("", default_mode) else ""
        row = RowSpec(kind, dtype or args.dtype or "float32", mode, suffix)
        if row in rows:
            parser.error(f"argument --rows: {row.name} is named twice")
        rows.append(row)
    return rows
