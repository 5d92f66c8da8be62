"""The paper's findings, repeated in small: ``python benchmarks/reproduction.py --out DIR``.

On the ``shapes`` data, with the package's trainer and the trained ``shapes`` preset (or --model FOLDER): hybrid against
discrete-only, the tokenizer's stages, unmasking steps, another resolution, low resolution first, the head's last
forward, guidance, denoising steps and temperature; on request the throughput of the full size. Every study is measured
with several seeds, and says by one rule whether the paper's finding shows, does not show or is reversed at this scale.

DIR gets results.json, tables.md and a PNG per study (which needs matplotlib, of the extra "bench"), written after every
study. Each finished cell, a study's part with one seed, is a file; run again, the same command goes on where it
stopped, trainings at their last checkpoint. The exit status is 1 if a cell failed, 130 if the command was stopped.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from _arguments import Parser, check_device, integer
from _report import commit, environment, note, threads

TRAINS = ("stages", "pretraining")
ERRORS = (ValueError, RuntimeError, OSError)  # what a cell may fail with; torch's errors are RuntimeErrors


def parse(arguments: Sequence[str] | None) -> tuple[Parser, Any]:
    """The command line; what can be seen from it alone is checked."""
    from _reproduction.studies import DEFAULT, STUDIES

    parser = Parser(prog="reproduction.py", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results and trainings")
    parser.add_argument(
        "--studies",
        nargs="+",
        choices=tuple(STUDIES),
        default=list(DEFAULT),
        metavar="STUDY",
        help=f"of {', '.join(STUDIES)} (default: all but full-size, whose one image takes minutes on a CPU)",
    )
    parser.add_argument("--seeds", nargs="+", type=integer(0), default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument(
        "--prompts", type=integer(2, 1200), metavar="N", help="held-out prompts per variant and seed (300; quick: 24)"
    )
    parser.add_argument("--model", default="shapes", metavar="FOLDER", help="a trained model (default: the preset)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--quick", action="store_true", help="toy budgets, to see that everything runs in minutes")
    given = parser.parse_args(arguments)
    for name in ("studies", "seeds"):
        values = getattr(given, name)
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            parser.error(f"argument --{name}: {twice[0]} is named twice")
    needed = ("torchmetrics", *(("accelerate",) if set(TRAINS) & set(given.studies) else ()))
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        parser.error(f"{', '.join(missing)} is missing: pip install -e '.[train]'")
    given.device = check_device(parser, given.device)
    given.studies = [name for name in STUDIES if name in given.studies]
    return parser, given


def prepare(parser: Parser, given: Any, budget: Any) -> Any:
    """The context: model and folder, both checked."""
    import torch
    from _reproduction.context import Context, load_model, model_fingerprint
    from _reproduction.store import Store
    from _reproduction.studies import STUDIES
    from _session import device_name

    from dcar_fast._files import check_writable

    try:
        check_writable(given.out / "results.json")
    except ValueError as error:
        parser.error(f"argument --out: {error}")
    device, folder, pipeline = torch.device(given.device), None, None
    if any(STUDIES[name].trained for name in given.studies):
        try:
            folder, pipeline = load_model(given.model, device)
        except ValueError as error:
            parser.error(f"argument --model: {error}")
    settings = {
        "quick": given.quick,
        "budget": budget.to_dict(),
        "device": "cpu" if device.type == "cpu" else device_name(device),
        "model": None if pipeline is None else model_fingerprint(pipeline),
    }
    try:
        store = Store(given.out, settings)
    except ValueError as error:
        parser.error(f"argument --out: {error}")
    return Context(store, budget, device, folder, pipeline)


class Suite:
    """The cells of a command, and what is written of them."""

    def __init__(self, context: Any, given: Any, command: str) -> None:
        from _session import device_name

        self.context, self.given, self.failures = context, given, dict[str, str]()
        self.studies = self._all_studies()
        load = os.getloadavg()[0]
        self.environment = {
            "device": device_name(context.device),
            "threads": threads(given.device),
            "cores": os.cpu_count(),
            "load": load,
            "versions": environment(given.device),
            "commit": commit(),
            "time": now(),
            "command": command,
        }
        if context.device.type == "cpu" and load > (os.cpu_count() or 1) / 2:
            note(f"WARNING: the machine has been busy (load {load:.1f}): times will be too long")

    def _all_studies(self) -> list[Any]:
        """Those of the command, and those of earlier commands with the same settings."""
        from _reproduction.studies import STUDIES

        done = {cell["study"] for cell in self.context.store.cells()}
        return [study for name, study in STUDIES.items() if name in self.given.studies or name in done]

    def run(self) -> None:
        """Every cell that is not done, seed by seed; what fails is said, and the rest goes on."""
        for study in self.studies:
            if study.name not in self.given.studies:
                continue
            self.context.kept.clear()
            for seed in self.given.seeds:
                for part in study.parts:
                    self.cell(study, part, seed)
            self.write()
        self.context.kept.clear()

    def cell(self, study: Any, part: str, seed: int) -> None:
        """Measures a part with one seed, unless that is done."""
        from _reproduction.store import write

        path = self.context.store.cell(study.name, part, seed)
        if path.is_file():
            return
        name = f"{study.name}, {part}, seed {seed}"
        note(name)
        start = time.monotonic()
        try:
            outcome = study.parts[part](self.context, seed)
            seconds = time.monotonic() - start
            record = {"study": study.name, "part": part, "seed": seed, "outcome": outcome, "seconds": seconds}
            where = {key: self.environment[key] for key in ("device", "threads", "load", "versions", "commit")}
            write(path, record | {"finished": now(), "environment": where})
        except ERRORS as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
            note(f"reproduction.py: error: {name}: {self.failures[name]}")
            return
        note(f"{name}: {seconds:.1f} s")

    def write(self) -> None:
        """results.json, tables.md out of it, and the plots."""
        from _reproduction import plots, report
        from _reproduction.store import read, write

        from dcar_fast._files import write_atomically

        store, given, out = self.context.store, self.given, self.given.out
        head = {"quick": given.quick, "settings": store.settings, "environment": self.environment}
        cells = [cell for cell in store.cells() if cell["study"] in {study.name for study in self.studies}]
        head |= {"failures": self.failures}
        studies = [
            (study, given.seeds if study.name in given.studies else report.complete_seeds(study, cells))
            for study in self.studies
        ]
        write(out / "results.json", report.results(head, studies, cells))
        found = read(out / "results.json")
        text = report.tables(found)
        write_atomically(out / "tables.md", lambda path: path.write_text(text, encoding="utf-8"))
        if plots.can_plot():
            for study, entry in zip(self.studies, found["studies"], strict=True):
                plots.plot(study, entry, out / f"{study.name}.png", " (quick)" if given.quick else "")


def now() -> str:
    """UTC, in seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None, budget: Any = None) -> int:
    """Runs the benchmark from its command line; returns the exit code. budget: instead of the one that --quick says."""
    from _reproduction.budget import FULL, QUICK

    parser, given = parse(arguments)
    budget = budget or (QUICK if given.quick else FULL)
    if given.prompts is not None:
        budget = replace(budget, prompts=given.prompts)
    command = shlex.join(["python", "benchmarks/reproduction.py", *(sys.argv[1:] if arguments is None else arguments)])
    from dcar_fast.training.lock import only_writer

    with ExitStack() as stack:
        try:
            stack.enter_context(only_writer(given.out))
        except ValueError as error:
            parser.error(f"argument --out: {error}")
        return perform(parser, given, budget, command)


def perform(parser: Parser, given: Any, budget: Any, command: str) -> int:
    """The cells, and what is written at the end however they end."""
    from _reproduction.plots import can_plot

    context = prepare(parser, given, budget)
    if not can_plot():
        note("no plots: matplotlib is missing (pip install -e '.[bench]')")
    suite = Suite(context, given, command)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        suite.run()
    except KeyboardInterrupt as interrupt:
        suite.write()
        note(f"reproduction.py: stopped ({str(interrupt) or 'interrupted'}); the same command goes on from here")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print((given.out / "tables.md").read_text(encoding="utf-8"))
    return 1 if suite.failures else 0


if __name__ == "__main__":
    sys.exit(main())
