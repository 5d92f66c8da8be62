"""What latency.py and throughput.py share: arguments, parity gate, interleaved timing, tables and the JSON line.

Import this module before dcar_fast: it makes the checkout's package importable where none is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("dcar_fast") is None:
    sys.path.append(str(ROOT))

PRESETS = ("shapes", "dc-ar-256", "dc-ar-512", "dc-ar-1024")
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("eager", "compile")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
STAGES = ("text", "unmask", "head", "decode")
PROMPT_TOKENS = 64

# Parity. float32: relative to the largest reference value; TF32 convolutions, torch's default on GPUs, round to 2^-11.
TOLERANCE = 1e-4
TF32_TOLERANCE = 1e-2
RESIDUAL_TOLERANCE = 1e-3  # at t = 999 the schedule multiplies rounding errors by 2e4
FREE_AGREEMENT = 0.99  # of ids in a free run: one near tie that falls the other way moves its neighbours
EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
PLAIN_LIMIT = 32  # roundings that plain low precision may be off by, of the largest reference value

# Without --warmup and --repeats. "large": full size on a CPU, minutes per round; there the parity check, which has run
# every stage in the timed shapes, is the warm-up.
AUTO_WARMUP = {"small": 1, "large": 0, "cuda": 3}
AUTO_SECONDS = {"small": 20.0, "large": 150.0, "cuda": 60.0}  # timed part, all rows together
AUTO_LIMITS = {"small": (2, 20), "large": (2, 5), "cuda": (5, 30)}


class Failure(Exception):
    """Ends the benchmark with one line and exit code 1."""


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


# ---- rows in their processes


class RowFailed(Exception):
    """A row that cannot do what it was asked, with the reason in one line."""


class Row:
    """A row's process, seen from the parent, and what was measured of it."""

    def __init__(self, spec: Any, work: Any) -> None:
        from _session import serve

        self.spec = spec
        self.unavailable: str | None = None
        self.seconds: list[float] = []
        self.stages: list[dict[str, float]] = []
        self.peak: int | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, spec, work), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def name(self) -> str:
        return self.spec.name

    def call(self, method: str, *arguments: Any) -> Any:
        """The session's answer; ``RowFailed`` if it raised or its process died."""
        try:
            self._connection.send((method, arguments))
            status, answer, *trace = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            hint = " (killed; most likely out of memory)" if code == -9 else ""
            raise RowFailed(f"its process ended with exit code {code}{hint}") from None
        if status == "error":
            note(trace[0].rstrip())
            raise RowFailed(answer)
        return answer

    def close(self) -> None:
        self._connection.close()  # the process ends when it next listens
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@dataclass
class Rows:
    """The rows of one benchmark; those that fail on the way drop out of ``able`` but stay in the results."""

    all: list[Row] = field(default_factory=list)

    @property
    def able(self) -> list[Row]:
        return [row for row in self.all if row.unavailable is None]

    def call(self, method: str, *arguments: Any, skip: Any = None) -> dict[Row, Any]:
        """The answers of all able rows but that of spec ``skip``, asked one after the other."""
        answers = {}
        for row in self.able:
            if row.spec == skip:
                continue
            try:
                answers[row] = row.call(method, *arguments)
            except RowFailed as reason:
                row.unavailable = str(reason)
                row.close()
                note(f"{row.name} is unavailable: {reason}")
        return answers


# ---- parity


def check_parity(rows: Rows, settings: Settings) -> None:
    """Holds every row against eager float32 before anything is timed. ``Failure`` if one is off.

    float32: every stage within a tolerance, ids equal but for near ties. Low precision: every stage's error at most
    twice that of plain low-precision PyTorch plus a rounding of the reference; plain low precision itself, at most
    ``PLAIN_LIMIT`` roundings.
    """
    from _session import RowSpec

    reference_spec = RowSpec("eager", "float32")
    extra: list[Row] = []

    def helper(spec: Any) -> Row:
        """The row itself if it is timed anyway, else one for the check alone."""
        for row in rows.all:
            if row.spec == spec:
                return row
        note(f"starting {spec.name} for the parity check alone")
        row = Row(spec, settings.work)
        extra.append(row)
        row.call("build")
        return row

    try:
        with tempfile.TemporaryDirectory(prefix="dcar-parity-") as folder:
            reference = helper(reference_spec)
            reference.call("record_reference", folder)
            reports = rows.call("parity", folder, skip=reference_spec)
            plain = {row.spec.dtype: r["errors"] for row, r in reports.items() if row.spec.kind == "eager"}
            for dtype in {row.spec.dtype for row in rows.able if row.spec.kind != "eager"} - {"float32", *plain}:
                plain[dtype] = helper(RowSpec("eager", dtype)).call("parity", folder)["errors"]
    except RowFailed as reason:
        raise Failure(f"parity check: what the rows are held against cannot run here: {reason}") from None
    finally:
        for row in extra:
            row.close()
    red = []
    print("parity with eager-float32 (largest error, relative to the largest value):")
    for row in rows.able:
        if row.spec == reference_spec:
            print(f"  {row.name:<28} the reference")
            continue
        report = reports[row]
        stages = ", ".join(f"{s} {e / report['scales'][s]:.1e}" for s, e in report["errors"].items())
        ids = f"ids {report['step_agreement']:.2%} step by step, {report['agreement']:.2%} in a free run"
        problems = judge(row.spec, report, plain.get(row.spec.dtype), settings.work.device)
        red += [f"{row.name}: {problem}" for problem in problems]
        print(f"  {row.name:<28} {stages}; {ids}: {'RED' if problems else 'ok'}")
    if red:
        raise Failure("parity check failed, nothing was timed: " + "; ".join(red))


def judge(spec: Any, report: dict[str, Any], plain: dict[str, float] | None, device: str) -> list[str]:
    """What is wrong with a row's parity report; empty if nothing is. NaN is always wrong."""
    problems = []
    for stage, error in report["errors"].items():
        scale = report["scales"][stage]
        if spec.dtype == "float32":
            relative = TF32_TOLERANCE if stage == "image" and device != "cpu" else TOLERANCE
            allowed, rule = relative * scale, f"{relative:g} of {scale:.3g}"
        elif spec.kind == "eager" or plain is None:
            allowed = PLAIN_LIMIT * EPSILON[spec.dtype] * scale
            rule = f"{PLAIN_LIMIT} roundings of {scale:.3g}"
        else:
            allowed = 2 * plain[stage] + EPSILON[spec.dtype] * scale
            rule = f"2 x plain {spec.dtype}'s {plain[stage]:.3g} + a rounding of {scale:.3g}"
        if not error <= allowed:
            problems.append(f"{stage} is off by {error:.3g}, allowed {allowed:.3g} ({rule})")
    if spec.dtype == "float32":
        if report["unexplained_ids"]:
            problems.append(f"{report['unexplained_ids']} ids differ by more than a near tie")
        if not report["agreement"] >= FREE_AGREEMENT:
            problems.append(f"only {report['agreement']:.2%} of the ids of a free run agree")
        if report["residual"] is not None and not report["residual"] <= RESIDUAL_TOLERANCE:
            problems.append(f"residuals are off by {report['residual']:.3g}, allowed {RESIDUAL_TOLERANCE:g}")
    return problems


# ---- timing


def measure(rows: Rows, settings: Settings) -> str:
    """Warm-up, timed runs (A B C A B C: drift hits all rows equally), then instrumented runs for the stages. Fills the
    rows in; returns a sentence on how often each was run."""
    on_cpu = settings.work.device == "cpu"
    kind = "cuda" if not on_cpu else "small" if settings.work.preset == "shapes" else "large"
    warmup = settings.warmup if settings.warmup is not None else AUTO_WARMUP[kind]
    lengths: dict[str, float] = {}
    for i in range(warmup):
        note(f"warm-up {i + 1} of {warmup}")
        lengths = rows.call("run", 1_000_000 + i)
    if settings.repeats is not None:
        repeats, chosen = settings.repeats, ""
    else:
        low, high = AUTO_LIMITS[kind]
        seconds = sum(lengths.values())
        repeats = max(low, min(high, int(AUTO_SECONDS[kind] / seconds))) if seconds else low
        reason = f"one round takes {seconds:.3g} s" if seconds else f"the least for {kind} work"
        chosen = f" (chosen: {reason}; --repeats overrides)"
    rows.call("reset_peak")
    longest = 0.0
    for i in range(repeats):
        note(f"timed round {i + 1} of {repeats}")
        answers = rows.call("run", i)
        longest = max(longest, sum(answers.values()))
        for row, seconds in answers.items():
            row.seconds.append(seconds)
    for row, peak in rows.call("peak").items():
        row.peak = peak
    instrumented = min(repeats, 5, int(AUTO_SECONDS["small"] / longest) or 1) if longest else 1
    for i in range(instrumented):
        note(f"instrumented round {i + 1} of {instrumented}")
        for row, stages in rows.call("run_stages", 2_000_000 + i).items():
            row.stages.append(stages)
    return f"{warmup} warm-up, {repeats} timed{chosen}, {instrumented} instrumented runs per row, interleaved"


def result_of(row: Row, batch: int) -> dict[str, Any]:
    """The row's entry of the JSON line; an unavailable row has nulls and the reason."""
    if row.unavailable is not None:
        numbers = dict.fromkeys(("median_s", "p20_s", "p80_s", "images_per_s", "peak_bytes"))
        return {"name": row.name, "dtype": row.spec.dtype, **numbers, "stages": {}, "unavailable": row.unavailable}
    median = statistics.median(row.seconds)
    return {
        "name": row.name,
        "dtype": row.spec.dtype,
        "median_s": median,
        "p20_s": percentile(row.seconds, 0.2),
        "p80_s": percentile(row.seconds, 0.8),
        "images_per_s": batch / median,
        "peak_bytes": row.peak,
        "stages": {s: statistics.median(run.get(s, 0.0) for run in row.stages) for s in STAGES},
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values, numpy's default."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


# ---- reports


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    text = []
    for line in (header, *lines):
        first, *others = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def duration(seconds: float | None) -> str:
    """Milliseconds below ten seconds."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.4g} ms" if seconds < 10 else f"{seconds:.4g} s"


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


def print_tables(results: list[dict[str, Any]], settings: Settings) -> None:
    from dcar_fast import flops
    from dcar_fast.config import SamplingConfig

    work = settings.work
    sampling = SamplingConfig(num_steps=work.steps)
    stages = flops.generation(
        settings.config, sampling, batch=work.batch, grid=settings.grid, prompt_tokens=work.prompt_tokens
    )
    total = sum(flops.flops(ops) for ops in stages.values())
    base = next((r["median_s"] for r in results if r["median_s"]), None)
    lines = []
    for r in results:
        if "unavailable" in r:
            lines.append([r["name"], "unavailable", *[""] * 6])
            continue
        lines.append(
            [
                r["name"],
                duration(r["median_s"]),
                duration(r["p20_s"]),
                duration(r["p80_s"]),
                f"{r['images_per_s']:.4g}",
                f"{base / r['median_s']:.2f}x",
                f"{total / r['median_s'] / 1e12:.3g}",
                mebibytes(r["peak_bytes"]),
            ]
        )
    print()
    print(table(["row", "median", "p20", "p80", "images/s", "speed", "TFLOP/s", "peak memory"], lines))
    header = ["stage", "text", f"unmask x{work.steps}", "head", "decode", "sum", "total"]
    lines = []
    for r in results:
        if "unavailable" in r:
            print(f"{r['name']} is unavailable: {r['unavailable']}")
            continue
        times = [r["stages"][s] for s in STAGES]
        lines.append([r["name"], *map(duration, times), duration(sum(times)), duration(r["median_s"])])
    print()
    print(table(header, lines))
    memory = (
        "peak memory: torch.cuda.max_memory_allocated of each row's own process during the timed runs"
        if work.device != "cpu"
        else "peak memory: largest resident set of each row's own process during the timed runs, libraries included"
    )
    print("\ntotal: from prompts to pixels on the device without a stop in between; stages: separate runs with stops")
    print(memory)
    print(f"work: {total / 1e12:.4g} TFLOP per batch; speed: relative to the first row")


def environment(device: str) -> dict[str, str | None]:
    """Versions of what was run; None for what is missing."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    from dcar_fast import __version__

    versions["dcar_fast"] = __version__
    versions["cuda"] = torch.version.cuda
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = _output(query) if device != "cpu" else None
    versions["driver"] = driver.splitlines()[0].strip() if driver else None
    return versions


def commit() -> str | None:
    """The commit of the package that was run, "-dirty" if tracked files differ from it; None outside git."""
    import dcar_fast

    folder = str(Path(dcar_fast.__file__).resolve().parent.parent)
    revision = _output(["git", "-C", folder, "rev-parse", "HEAD"])
    if not revision:
        return None
    changed = _output(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"])
    return revision.strip() + ("-dirty" if changed else "")


def _output(command: list[str]) -> str | None:
    """A command's output, None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def note(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)


# ---- the command


def main(benchmark: str, batch: int, description: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark from its command line; returns the exit code."""
    settings = parse(benchmark, batch, description, arguments)
    from dcar_fast._files import write_atomically

    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if settings.work.device == "cpu" and load > cores / 2:
        note(
            f"WARNING: the machine has been busy (load {load:.1f} on {cores} cores). Threads that wait for a core "
            "make times many times too long; OMP_NUM_THREADS=N uses N cores alone"
        )
    rows = Rows()
    try:
        note(f"starting {', '.join(spec.name for spec in settings.rows)}")
        rows.all = [Row(spec, settings.work) for spec in settings.rows]
        names = rows.call("build")
        if not names:
            raise Failure("no row could be built")
        work, name = settings.work, next(iter(names.values()))
        print(
            f"{settings.benchmark}: {work.preset}, {work.width} x {work.height} px, batch {work.batch}, "
            f"{work.steps} steps, prompt of {work.prompt_tokens} tokens, {name}"
        )
        note("checking parity (compiled rows compile now)")
        check_parity(rows, settings)
        runs = measure(rows, settings)
        if not rows.able:
            raise Failure("no row could be run: " + "; ".join(f"{r.name}: {r.unavailable}" for r in rows.all))
        results = [result_of(row, work.batch) for row in rows.all]
    except Failure as failure:
        note(f"{benchmark}.py: error: {failure}")
        return 1
    finally:
        for row in rows.all:
            row.close()
    print(runs)
    print_tables(results, settings)
    line = json.dumps(
        {
            "benchmark": settings.benchmark,
            "preset": work.preset,
            "batch": work.batch,
            "height": work.height,
            "width": work.width,
            "steps": work.steps,
            "device": name,
            "rows": results,
            "versions": environment(work.device),
            "commit": commit(),
            "time": started,
        }
    )
    if settings.json is not None:
        write_atomically(settings.json, lambda path: path.write_text(line + "\n"))
    print()
    print(line)
    return 0
