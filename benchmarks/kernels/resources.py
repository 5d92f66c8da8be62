"""Registers, spills, shared memory and matrix instructions of every kernel, Triton's and csrc's. Needs no GPU.

    python benchmarks/kernels/resources.py [--json FILE] [--targets 80 90] [--match TEXT] [--all] [--markdown [FILE]]

compiles what ships for sm_80, sm_89, sm_90 and sm_100; ``--all`` adds every tuning candidate and sm_120. ``--markdown``
writes the summary between its two markers in docs/performance.md. The exit code is 1 if something that ships spills,
needs more shared memory than a block can have, lacks the matrix instructions it should have, or does not compile.
A candidate may: the tuner passes over it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import _compare  # noqa: F401  (makes dcar_fast importable, so it is first)
from _report import ROOT

from dcar_fast._files import check_writable, write_atomically
from dcar_fast.kernels import offline
from dcar_fast.kernels.configs import SHARED_LIMIT

PAGE = ROOT / "docs" / "performance.md"
MARKERS = "<!-- resources: begin -->", "<!-- resources: end -->"
COLUMNS = f"{'kernel':<72}{'target':>8}{'registers':>11}{'spills':>8}{'shared':>8}  matrix instructions"

Row = dict[str, Any]
Job = tuple[int, str, int, bool]  # target, op, number among its variants, every


def triton_rows(targets: Iterable[int], every: bool, match: str) -> Iterator[Row]:
    """A row per variant, in order, compiled on every core."""
    jobs, rows = [], []
    for target in targets:
        for op in offline.kernel_names():
            shipped = {variant.label for variant in offline.variants(target, False, [op])}
            for number, variant in enumerate(offline.variants(target, every, [op])):
                if match in variant.label:
                    jobs.append((target, op, number, every))
                    rows.append(blank(variant, target, variant.label in shipped))
    # Variants hold functions, which do not travel between processes: they are named by op and number instead.
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1) or 1, context) as pool:
        for row, found in zip(rows, pool.map(compile_job, jobs), strict=True):
            yield row | found


def blank(variant: offline.Variant, target: int, shipped: bool) -> Row:
    return {
        "kernel": variant.name,
        "target": f"sm_{target}",
        "dtype": variant.dtype,
        "shape": variant.shape,
        "config": str(variant.config),
        "launch": variant.config.launch,
        "backend": "triton",
        "shipped": shipped,
        "tensor_cores": variant.tensor_cores,
        "shared_limit": SHARED_LIMIT[target],
    }


def compile_job(job: Job) -> Row:
    target, op, number, every = job
    try:
        got = offline.compile_variant(offline.variants(target, every, [op])[number], target)
    except Exception as error:  # a candidate that the compiler refuses must not end the table; defects() reports it
        numbers = dict.fromkeys(("registers", "spills", "stack_bytes", "shared_bytes"))
        return {**numbers, "mma": {}, "error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    return {
        "registers": got.registers,
        "spills": got.spills,
        "stack_bytes": got.stack,
        "shared_bytes": got.shared,
        "mma": got.mma,
    }


def native_rows(targets: Iterable[int], match: str) -> tuple[list[Row], str | None]:
    """nvcc's report of csrc in the same form, or the reason for having none."""
    try:
        import _native_resources
    except ModuleNotFoundError as error:
        return [], str(error)
    try:
        rows = _native_resources.native_rows()
    except (OSError, RuntimeError, ValueError) as error:
        return [], str(error)
    wanted = {str(target) for target in targets}
    rows = [native_row(row) for row in rows if number(row["target"]) in wanted]
    return [row for row in rows if match in label(row)], None


def native_row(row: Row) -> Row:
    """What cuobjdump says of a kernel of csrc as a row like Triton's: its template arguments are types and tiles, and
    every shape runs the same code."""
    name, _, arguments = row["kernel"].partition("<")
    return {
        "kernel": name,
        "target": row["target"],
        "dtype": arguments.removesuffix(">"),
        "shape": "any",
        "config": "",
        "backend": "cuda",
        "shipped": True,
        "tensor_cores": False,
        "registers": row["registers"],
        "spills": row["spills"],
        "stack_bytes": row["stack"],
        "shared_bytes": row["shared_bytes"],
        "mma": row["mma"],
    }


def number(target: str) -> str:
    """ "90" of "sm_90a"."""
    return re.search(r"\d+", target)[0]


def label(row: Row) -> str:
    return " ".join(filter(None, (row["kernel"], row["dtype"], row["shape"], row["config"])))


def defects(row: Row) -> list[str]:
    """What is wrong with a variant."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["spills"] or row.get("stack_bytes"):
        found.append(f"spills ({row['spills']} instructions, {row.get('stack_bytes', 0)} bytes of stack)")
    limit = row.get("shared_limit") or SHARED_LIMIT[int(number(row["target"]))]
    if row["shared_bytes"] > limit:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, a block can have {limit}")
    if row["tensor_cores"] and not row["mma"]:
        found.append("has no matrix instructions")
    return found


def line(row: Row) -> str:
    mma = " ".join(f"{name} {count}" for name, count in row["mma"].items())
    wrong = "; ".join(defects(row))
    numbers = ("-" if row[key] is None else str(row[key]) for key in ("registers", "spills", "shared_bytes"))
    registers, spills, shared = numbers
    text = f"{label(row):<72}{row['target']:>8}{registers:>11}{spills:>8}{shared:>8}  {mma}"
    return f"{text} {'!' if row['shipped'] else '('}{wrong}{'' if row['shipped'] else ')'}" if wrong else text.rstrip()


def markdown(rows: list[Row]) -> str:
    """A table of what ships: a line per kernel, a column per target."""
    rows = [row for row in rows if row["shipped"]]
    targets = sorted({number(row["target"]) for row in rows}, key=int)
    lines = ["| kernel | " + " | ".join(f"sm_{target}" for target in targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for kernel, backend in sorted({(row["kernel"], row["backend"]) for row in rows}):
        cells = []
        for target in targets:
            cells.append(
                cell([r for r in rows if (r["kernel"], r["backend"], number(r["target"])) == (kernel, backend, target)])
            )
        name = f"`{kernel}`" + (" (CUDA C++)" if backend == "cuda" else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(rows: list[Row]) -> str:
    """Registers, the largest shared memory, the kinds of matrix instructions, and what is wrong."""
    if not rows:
        return "-"
    built = [row for row in rows if "error" not in row]
    parts = []
    if built:
        registers = sorted({row["registers"] for row in built})
        shared = max(row["shared_bytes"] for row in built)
        size = f"{shared / 1024:.3g} K" if shared >= 1024 else f"{shared} B"
        parts = ["-".join(map(str, sorted({registers[0], registers[-1]}))), size]
        parts += ["+".join(sorted({name for row in built for name in row["mma"]}))]
    wrong = dict.fromkeys(f"**{defect}**" for row in rows for defect in defects(row))
    return ", ".join(part for part in [*parts, *wrong] if part)


def split(page: Path) -> tuple[str, str]:
    """What stands before and after the table of a page, markers included. ValueError if they are not there."""
    begin, end = MARKERS
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} does not have {begin} and {end}, once each and in this order")
    return text[: text.index(begin) + len(begin)], text[text.index(end) :]


def insert(page: Path, table: str) -> None:
    """Puts ``table`` between the markers of a page."""
    before, after = split(page)
    write_atomically(page, lambda path: path.write_text(f"{before}\n{table}\n{after}", encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", choices=sorted(SHARED_LIMIT), metavar="CC")
    parser.add_argument("--match", default="", help="only variants whose label contains this")
    parser.add_argument("--all", action="store_true", help="also every tuning candidate, and sm_120")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, nargs="?", const=PAGE, metavar="FILE", help="fill in the page's table")
    arguments = parser.parse_args()
    try:
        if arguments.json:
            check_writable(arguments.json)
        if arguments.markdown:
            split(arguments.markdown)
    except ValueError as error:
        parser.error(str(error))

    targets = arguments.targets or (offline.EVERY_TARGET if arguments.all else offline.TARGETS)
    print(COLUMNS)
    rows: list[Row] = []
    for row in triton_rows(targets, arguments.all, arguments.match):
        rows.append(row)
        print(line(row), flush=True)
    native, missing = native_rows(targets, arguments.match)
    for row in native:
        rows.append(row)
        print(line(row), flush=True)
    if missing:
        print(f"not in the table: csrc: {missing}")
    if arguments.json:
        write_atomically(arguments.json, lambda path: path.write_text(json.dumps(rows, indent=1) + "\n"))
    if arguments.markdown:
        insert(arguments.markdown, markdown(rows))
    wrong = [
        f"{row['target']} {label(row)}: {'; '.join(defects(row))}" for row in rows if row["shipped"] and defects(row)
    ]
    passed_over = sum(bool(defects(row)) for row in rows if not row["shipped"])
    print(f"{len(rows)} variants, {len(wrong)} of what ships with defects, {passed_over} candidates that do not fit")
    for problem in wrong:
        print(f"defect: {problem}", file=sys.stderr)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
