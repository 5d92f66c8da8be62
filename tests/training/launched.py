"""Run by a launcher in each process: trains toy tasks as a JSON list of cases says, and writes how each ended.

A case: "output", changes of the run's settings, "task": arguments of the task, "kill": [rank, step].
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.training.toy_task import ToyTask, run


class Signalled(ToyTask):
    """One process gets SIGTERM in the middle of a step."""

    def __init__(self, kill: list[int] | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.kill = kill

    def train_step(self, run, batches):
        if self.kill == [int(os.environ["RANK"]), run.step]:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step(run, batches)


def write_threads(path: Path) -> None:
    path.write_text("\n".join(task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")))


def main() -> None:
    atexit.register(write_threads, Path(f"{sys.argv[1]}.{os.environ['RANK']}.threads"))  # the last thing that runs
    torch.set_num_threads(1)
    cases, ends = json.loads(Path(sys.argv[1]).read_text()), []
    if len(cases) > 1:  # the runs share one process group; a single one makes its own
        torch.distributed.init_process_group("gloo")
    for case in cases:
        task = Signalled(case.pop("kill", None), **case.pop("task", {}))
        try:
            report = run(case.pop("output"), task, **case)
            ends.append(["done", report.step, report.metrics.get("loss")])
        except (ValueError, RuntimeError, KeyboardInterrupt) as error:
            ends.append([type(error).__name__, str(error)])
    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(ends))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
