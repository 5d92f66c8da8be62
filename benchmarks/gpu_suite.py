"""Everything there is to measure on a GPU, in one command of ten minutes; without a GPU, what a CPU can say.

    python benchmarks/gpu_suite.py --out DIR [--parts build tests kernels ...] [--minutes 9] [--quick]

Parts: build, ceilings, warmup, latency, throughput, graphs, tests, precision, profile, kernels, baselines, sanitizer;
resources and tune when asked for. Each is one or several commands with a time limit of their own. A part that cannot
run here says why, one that no longer fits into the time is skipped, and the rest goes on. DIR gets at most eight files,
written after every step: summary.md and summary.json, environment.json, kernels.json, logs.txt, and resources.json,
profile.txt, tuned.json of the parts that make them. The exit status is 1 if something failed, 130 if the suite was
stopped.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from _arguments import Parser
from _report import ROOT
from _suite import judge, parts, report
from _suite.process import run
from _suite.steps import PYTHON, Plan, Step

PATH = [str(ROOT / "benchmarks"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(PATH), "PYTHONUNBUFFERED": "1"}
DEFAULT_MINUTES = 9.0  # a machine that gives ten to a command also needs a moment to hand the files over


class Suite:
    """What was done so far, and the time that is left."""

    def __init__(self, out: Path, minutes: float, arguments: Sequence[str]) -> None:
        self.out = out
        self.deadline = time.monotonic() + 60 * minutes
        self.head: dict[str, Any] = {"arguments": list(arguments), "minutes": minutes, "stopped": None}
        self.head["environment"] = None
        self.records: list[dict[str, Any]] = []
        self.logs: dict[str, str] = {}

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def do(self, step: Step) -> judge.Outcome:
        """Runs a step if it can run and there is time, keeps what became of it, and writes the files."""
        start, limit = time.monotonic(), min(step.limit, self.left())
        if step.missing:
            outcome = judge.Outcome("unavailable", step.missing)
        elif limit < min(step.least, step.limit):
            outcome = judge.Outcome("skipped", f"needs {step.least:.0f} s, {max(self.left(), 0):.0f} s are left")
        else:
            print(f"{step.name} ...", flush=True)
            try:
                done = run(step.command, limit, ROOT, {**ENVIRONMENT, **step.environment})
            except KeyboardInterrupt:
                self.add(step, judge.Outcome("interrupted"), time.monotonic() - start)
                raise
            self.logs[step.name] = f"$ {' '.join(step.command)}\n{done.output}"
            outcome = step.judge(done)
        self.add(step, outcome, time.monotonic() - start)
        print(f"{step.name}: {outcome.status}, {time.monotonic() - start:.1f} s  {outcome.reason}", flush=True)
        return outcome

    def add(self, step: Step, outcome: judge.Outcome, seconds: float) -> None:
        record = {"name": step.name, "part": step.part, "seconds": seconds, "command": list(step.command)}
        self.records.append(record | outcome._asdict())
        self.write()

    def write(self) -> None:
        report.write(self.out, self.head, self.records, self.logs)

    def status(self) -> int:
        return 1 if any(record["status"] == "failed" for record in self.records) else 0


def stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


def perform(suite: Suite, device: str, commit: str, plan_steps: Callable[[dict[str, Any]], list[Step]]) -> int:
    """The environment, which tells whether there is a GPU, then the steps that ``plan_steps`` makes of it."""
    command = (PYTHON, "-m", "_suite.environment", device, commit)
    signal.signal(signal.SIGTERM, stop)
    try:
        found = suite.do(Step("environment", "environment", command, judge.last_json, limit=90))
        if found.result is None:
            print(f"gpu_suite.py: error: nothing is known of this machine: {found.reason}", file=sys.stderr)
            return 1
        suite.head["environment"] = found.result
        suite.write()
        if found.result["no_gpu"]:
            print(f"no GPU ({found.result['no_gpu']}): the CPU's parts run, others say that they cannot", flush=True)
        for step in plan_steps(found.result):
            suite.do(step)
    except KeyboardInterrupt as interrupt:
        suite.head["stopped"] = str(interrupt) or "interrupted"
        suite.write()
        print("gpu_suite.py: stopped; what was done is kept", file=sys.stderr)
        return 130
    return suite.status()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results, made if missing"
    )
    parser.add_argument("--parts", nargs="+", choices=("environment", *parts.PARTS), metavar="PART", help="only these")
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="for everything together (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="of the kernel benchmarks only these")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--no-build", action="store_true", help="leave the build out of the default parts")
    parser.add_argument("--commit", default="", help="the commit, for copies that are no git checkout")
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        parser.error(f"argument --minutes: must be above 0, got {given.minutes}")
    known = parts.kernel_benchmarks()
    for op in given.ops or ():
        if op not in known:
            parser.error(f"argument --ops: there is no benchmark of {op!r}, there are {', '.join(known)}")
    out = given.out.resolve()
    try:
        report.clear(out)
    except OSError as error:
        parser.error(f"argument --out: cannot write to {given.out}: {error.strerror}")

    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as scratch:

        def plan_steps(environment: dict[str, Any]) -> list[Step]:
            wanted = given.parts or (parts.GPU_PARTS if environment["device"] == "cuda" else parts.CPU_PARTS)
            wanted = [part for part in wanted if part != "environment" and not (part == "build" and given.no_build)]
            plan = Plan(
                device=environment["device"],
                quick=given.quick,
                out=out,
                scratch=Path(scratch),
                tools=environment["tools"],
                no_gpu=environment["no_gpu"],
                ops=tuple(given.ops or ()),
            )
            return parts.steps(tuple(dict.fromkeys(wanted)), plan)

        suite = Suite(out, given.minutes, arguments if arguments is not None else sys.argv[1:])
        status = perform(suite, given.device, given.commit, plan_steps)
    print(f"\n{(out / 'summary.md').read_text(encoding='utf-8')}")
    environment = suite.head["environment"]
    if environment:
        kept = f"benchmarks/results/{environment['name']}-{environment['date'][:10]}"
        print(f"to keep it: mkdir -p {kept} && cp {out}/* {kept}/")
    return status


if __name__ == "__main__":
    sys.exit(main())
