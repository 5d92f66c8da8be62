"""Runs pytest in several processes, each with its share of the tests.

    python -m _suite.shares 8 report.xml -m gpu tests/ops

Process i of n runs every n-th test and writes report.i.xml. As a plugin (-p _suite.shares) it picks them, after
SUITE_SHARE=i/n. Ends with the worst exit status, 5 (no tests were found) only if every process ends with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

NO_TESTS = 5  # pytest's exit status where a share is empty


def report_of(report: Path, share: int) -> Path:
    return report.with_suffix(f".{share}.xml")


def main() -> int:
    count, report, options = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    processes = []
    for share in range(count):
        command = [sys.executable, "-m", "pytest", "-p", "_suite.shares", *options]
        command.append(f"--junitxml={report_of(report, share)}")
        output = tempfile.TemporaryFile()
        environment = {**os.environ, "SUITE_SHARE": f"{share}/{count}"}
        processes.append((subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment), output))
    statuses = []
    for process, output in processes:
        statuses.append(wait(process))
        output.seek(0)
        sys.stdout.write(output.read().decode("utf-8", "replace"))
    ran = [status for status in statuses if status != NO_TESTS]
    return max(map(abs, ran), default=NO_TESTS)


def wait(process: subprocess.Popen) -> int:
    """The exit status. An interrupt reaches the processes as well: they write their reports, and then it is over."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            pass


@pytest.hookimpl(trylast=True)  # after -m has had its say
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, count = map(int, os.environ["SUITE_SHARE"].split("/"))
    kept = items[share::count]
    config.hook.pytest_deselected(items=[item for number, item in enumerate(items) if number % count != share])
    items[:] = kept


if __name__ == "__main__":
    sys.exit(main())
