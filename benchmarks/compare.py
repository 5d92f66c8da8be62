"""Two results of latency.py or throughput.py side by side: ``python benchmarks/compare.py OLD NEW``.

A file is the JSON that ``--json`` writes, or a saved output whose last line it is. "faster" is OLD's time divided by
NEW's: above 1, NEW is faster. A change is marked "~" where the two spans from p20 to p80 overlap.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from _arguments import Parser
from _report import Failure, duration, mebibytes, note, table

KEYS = {
    "benchmark": str,
    "preset": str,
    "batch": int,
    "height": int,
    "width": int,
    "steps": int,
    "device": str,
    "rows": list,
    "versions": dict,
    "commit": (str, type(None)),
    "time": str,
}
SAME = ("benchmark", "preset", "batch", "height", "width", "steps", "device")
NUMBERS = ("median_s", "p20_s", "p80_s", "images_per_s", "peak_bytes")


def load(path: Path) -> dict[str, Any]:
    """The result in a file; ``Failure`` with the reason if there is none."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    lines = text.strip().splitlines()
    if not lines:
        raise Failure(f"{path} is empty")
    try:
        result = json.loads(text)
    except json.JSONDecodeError:
        try:
            result = json.loads(lines[-1])
        except json.JSONDecodeError as error:
            raise Failure(f"{path}: its last line is no JSON ({error.msg} at column {error.colno})") from None
    check_result(path, result)
    return result


def check_result(path: Path, result: Any) -> None:
    """``Failure`` if what was read from ``path`` is no result of latency.py or throughput.py."""
    if not isinstance(result, dict):
        raise Failure(f"{path} holds a {type(result).__name__}, not a benchmark result")
    for key, kind in KEYS.items():
        if key not in result:
            raise Failure(f"{path} is no benchmark result: {key!r} is missing")
        if not isinstance(result[key], kind):
            raise Failure(f"{path} is no benchmark result: {key!r} is {result[key]!r:.40}")
    for i, row in enumerate(result["rows"]):
        problem = check_row(row)
        if problem:
            raise Failure(f"{path} is no benchmark result: rows[{i}] {problem}")
    names = [row["name"] for row in result["rows"]]
    if len(set(names)) != len(names):
        raise Failure(f"{path} is no benchmark result: a row is named twice in {names}")


def check_row(row: Any) -> str | None:
    """What is wrong with a row, None if nothing is."""
    if not isinstance(row, dict):
        return "is no object"
    missing = [key for key in ("name", "dtype", *NUMBERS, "stages") if key not in row]
    if missing:
        return f"lacks {', '.join(missing)}"
    if not isinstance(row["name"], str) or not isinstance(row["stages"], dict):
        return "has no name or no stages"
    if "unavailable" in row:
        return None
    values = [row[key] for key in NUMBERS] + [*row["stages"].values()]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and v >= 0 for v in values):
        return "has values that are no numbers >= 0"
    return None if row["median_s"] > 0 else "has a median of 0"


def ratio(old: float, new: float) -> str:
    return f"{old / new:.2f}x" if new and old else "-"


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The tables."""
    rows = {side: {row["name"]: row for row in result["rows"]} for side, result in (("OLD", old), ("NEW", new))}
    both, remarks = [], []
    for name in dict.fromkeys((*rows["OLD"], *rows["NEW"])):
        for side in rows:
            if name not in rows[side]:
                remarks.append(f"{name}: not in {side}")
                break
            if "unavailable" in rows[side][name]:
                remarks.append(f"{name}: unavailable in {side}: {rows[side][name]['unavailable']}")
                break
        else:
            both.append((name, rows["OLD"][name], rows["NEW"][name]))
    if not both:
        return "\n".join(["no row was measured in both files", *remarks])
    header = ["row", "old", "new", "faster", "", "images/s", "", "peak memory", ""]
    lines, stage_lines = [], []
    for name, a, b in both:
        overlap = a["p20_s"] <= b["p80_s"] and b["p20_s"] <= a["p80_s"]
        lines.append(
            [
                name,
                duration(a["median_s"]),
                duration(b["median_s"]),
                ratio(a["median_s"], b["median_s"]),
                "~" if overlap else "",
                f"{a['images_per_s']:.4g}",
                f"{b['images_per_s']:.4g}",
                mebibytes(a["peak_bytes"]),
                mebibytes(b["peak_bytes"]),
            ]
        )
        for s, time in a["stages"].items():
            if s in b["stages"]:
                after = b["stages"][s]
                stage_lines.append([f"{name} {s}", duration(time), duration(after), ratio(time, after)])
    text = [table(header, lines)]
    if stage_lines:
        text += ["", table(["stage", "old", "new", "faster"], stage_lines)]
    if any(line[4] for line in lines):
        text += ["", "~ the spans from p20 to p80 overlap: maybe no change at all"]
    return "\n".join([*text, *remarks])


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="compare.py", description="Two benchmark results side by side.")
    parser.add_argument("old", type=Path, metavar="OLD", help="a JSON file, or an output that ends with the JSON line")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--force", action="store_true", help="compare although preset, batch or device differ")
    args = parser.parse_args(arguments)
    try:
        old, new = load(args.old), load(args.new)
        different = [f"{key} {old[key]!r} and {new[key]!r}" for key in SAME if old[key] != new[key]]
        if different and not args.force:
            raise Failure(f"not comparable: {'; '.join(different)} (--force compares anyway)")
    except Failure as failure:
        note(f"compare.py: error: {failure}")
        return 1
    for side, path, result in (("OLD", args.old, old), ("NEW", args.new, new)):
        work = f"{result['benchmark']}, {result['preset']}, {result['width']} x {result['height']} px"
        print(f"{side}: {path}: {work}, batch {result['batch']}, {result['steps']} steps, {result['device']}")
        print(f"     commit {result['commit'] or 'unknown'}, {result['time']}")
    changed = [
        f"{name} {old['versions'].get(name)} -> {new['versions'].get(name)}"
        for name in dict.fromkeys((*old["versions"], *new["versions"]))
        if old["versions"].get(name) != new["versions"].get(name)
    ]
    if changed:
        print("versions differ: " + ", ".join(changed))
    for line in different:
        print(f"WARNING: they differ in {line}")
    print()
    print(compare(old, new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
