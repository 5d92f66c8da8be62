"""Writes the README's table of results from benchmarks/results/: ``python benchmarks/results_table.py [--check]``.

Results are the files of ``latency.py --json`` and ``throughput.py --json``, and the summary.json of gpu_suite.py in a
folder of its own. Of every benchmark, preset, size, batch and device the newest file is shown, each row with the speed
relative to the float32 reference of the same run. --check writes nothing and fails if the table is stale.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _arguments import Parser
from _report import ROOT, Failure, duration, mebibytes, note
from compare import check_result

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
BENCHMARKS = ("latency", "throughput")
KEY = ("benchmark", "preset", "batch", "height", "width", "steps", "device")
HEADER = ("benchmark", "row", "a batch", "p20 - p80", "images/s", "speed", "first", "peak memory", "run")
BASE = "eager-float32"


class Run(NamedTuple):
    """A result, and the file that it comes from."""

    file: Path
    result: dict[str, Any]

    @property
    def key(self) -> tuple:
        return tuple(self.result[name] for name in KEY)


def read(folder: Path) -> list[Run]:
    """Every timed result below ``folder``; ``Failure`` for a file that looks like one and is none."""
    runs = []
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise Failure(f"{path} is no JSON: {error}") from None
        for result in timed(content):
            check_result(path, result)
            runs.append(Run(path, result))
    return runs


def timed(content: Any) -> list[dict[str, Any]]:
    """The results of latency.py and throughput.py in a file: itself, or those of the suite's steps."""
    if not isinstance(content, dict):
        return []
    if isinstance(content.get("steps"), list):
        return [result for step in content["steps"] if isinstance(step, dict) for result in timed(step.get("result"))]
    name = content.get("benchmark")
    return [content] if isinstance(name, str) and name.partition(" ")[0] in BENCHMARKS else []


def newest(runs: Sequence[Run]) -> list[Run]:
    """Of each key the runs of the file with the newest; GPUs first."""
    files: dict[tuple, Run] = {}
    for run in runs:
        known = files.get(run.key)
        if known is None or run.result["time"] > known.result["time"]:
            files[run.key] = run
    kept = [run for run in runs if run.file == files[run.key].file]
    order = ("device", "benchmark", "preset", "height", "width", "batch", "time")
    return sorted(kept, key=lambda run: (on_cpu(run.result), *(run.result[name] for name in order)))


def on_cpu(result: dict[str, Any]) -> bool:
    return result["versions"].get("driver") is None and result["device"].endswith(" threads")


def render(runs: Sequence[Run]) -> str:
    """The text between the markers."""
    if not runs:
        return "Nothing has been measured yet."
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    notes = []
    for number, run in enumerate(runs, 1):
        result = run.result
        lines += ["| " + " | ".join(cells) + " |" for cells in table_rows(result, number)]
        notes.append(f"{number}. {describe(result)}")
    return "\n".join([*lines, "", *notes])


def table_rows(result: dict[str, Any], number: int) -> list[list[str]]:
    """A line for every row that was measured."""
    rows = [row for row in result["rows"] if "unavailable" not in row]
    base = next((row["median_s"] for row in rows if row["name"] == BASE), None)
    size = f"{result['width']} x {result['height']} px"
    what = f"{result['benchmark']}, {result['preset']}, {size}, batch {result['batch']}"
    return [
        [
            what,
            row["name"],
            duration(row["median_s"]),
            f"{duration(row['p20_s'])} - {duration(row['p80_s'])}",
            f"{row['images_per_s']:.4g}",
            f"{base / row['median_s']:.2f}x" if base else "-",
            duration(row.get("first_s")),
            mebibytes(row["peak_bytes"]),
            str(number),
        ]
        for row in rows
    ]


def describe(result: dict[str, Any]) -> str:
    """Where, with what and how a run was made."""
    name = result["benchmark"].partition(" ")[0]
    command = result.get("command") or f"python benchmarks/{name}.py --preset {result['preset']} --bs {result['batch']}"
    threads = re.search(r", (\d+) threads$", result["device"])
    command = f"OMP_NUM_THREADS={threads[1]} {command}" if threads else command
    versions = ", ".join(
        f"{name} {found}" for name, found in result["versions"].items() if found and name != "dcar_fast"
    )
    commit = (result["commit"] or "unknown").partition("-")
    text = f"`{command}`, {result['steps']} steps, on {result['device']}; {versions}; commit {commit[0][:12]}"
    text += f"{' with local changes' if commit[2] else ''}, {result['time'][:10]}."
    missing = [row for row in result["rows"] if "unavailable" in row]
    return text + "".join(f" {row['name']} could not run: {row['unavailable']}." for row in missing)


def replaced(text: str, table: str) -> str:
    """The README with ``table`` between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Failure(f"the README has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="results_table.py", description="Writes the README's table of results.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the table is stale")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="default: README.md")
    args = parser.parse_args(arguments)
    try:
        old = args.readme.read_text(encoding="utf-8")
        new = replaced(old, render(newest(read(args.results))))
    except OSError as error:
        parser.error(f"argument --readme: {args.readme} cannot be read: {error.strerror}")
    except Failure as failure:
        note(f"results_table.py: error: {failure}")
        return 1
    if new == old:
        print(f"{args.readme} is up to date")
        return 0
    if args.check:
        note(f"results_table.py: error: the results in {args.readme} are stale: run python benchmarks/results_table.py")
        return 1
    from dcar_fast._files import write_atomically

    write_atomically(args.readme, lambda path: path.write_text(new, encoding="utf-8"))
    print(f"wrote {args.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
