"""What one training step of a full-size model takes on a CPU: memory and seconds.

    python benchmarks/training_memory.py --what tokenizer [--size 256] [--bs 1] [--json FILE]
    python benchmarks/training_memory.py --what generator [--size 512]

Random data and weights, float32, AdamW and the moving average included; the second of two steps is timed. The memory is
the largest resident set of the process, libraries included. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
from datetime import datetime, timezone
from pathlib import Path

from _arguments import Parser, check_output, integer
from _report import commit, duration, environment, mebibytes, table, threads

SIZES = {"tokenizer": (256, 512), "generator": (256, 512, 1024)}


def measure(what: str, size: int, batch: int) -> dict:
    """Runs the step; {"seconds", "loss", "parameters"}."""
    if what == "tokenizer":
        from _training_tokenizer import tokenizer_step

        return tokenizer_step(size, batch)
    from _training_generator import generator_step

    return generator_step(size, batch)


def peak_bytes() -> int:
    """The largest resident set of this process so far; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    """The CPU's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    parser = Parser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--what", choices=tuple(SIZES), required=True, help="the model")
    parser.add_argument("--size", type=integer(1), default=256, metavar="PX", help="side of the pictures")
    parser.add_argument("--bs", type=integer(1), default=1, metavar="N", help="pictures per step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON line to this file")
    arguments = parser.parse_args()
    if arguments.size not in SIZES[arguments.what]:
        parser.error(
            f"argument --size: must be one of {SIZES[arguments.what]} for {arguments.what}, got {arguments.size}"
        )
    check_output(parser, "--json", arguments.json)
    found = measure(arguments.what, arguments.size, arguments.bs)
    result = {
        "benchmark": "training_memory",
        "what": arguments.what,
        "size": arguments.size,
        "batch": arguments.bs,
        "dtype": "float32",
        **found,
        "peak_bytes": peak_bytes(),
        "device": "cpu",
        "hardware": processor(),
        "threads": threads("cpu"),
        "versions": environment("cpu"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    line = [arguments.what, str(arguments.size), str(arguments.bs), f"{found['parameters'] / 1e6:,.1f} M"]
    line += [duration(found["seconds"]), mebibytes(result["peak_bytes"])]
    print(table(["model", "pixels", "batch", "parameters", "step", "peak memory"], [line]))
    text = json.dumps(result)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
