"""One command of the suite: its own time limit, its own process group, its output kept."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

GRACE = 5.0  # seconds between the interrupt, on which pytest still writes its report, and the kill
KEPT = 256 << 10  # characters of one command's output that are kept: the first quarter and the end


class Done(NamedTuple):
    """``code``: the exit status, None if the command ran out of time or could not be started (``output`` says why)."""

    code: int | None
    output: str
    seconds: float
    timed_out: bool = False


def run(command: Sequence[str], limit: float, folder: Path, environment: Mapping[str, str]) -> Done:
    """Runs ``command`` in ``folder`` for at most ``limit`` seconds; ends it and what it started if that was too short,
    or if an exception, such as an interrupt, comes in between."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Done(None, f"{command[0]} cannot be started: {error.strerror}", 0.0)
        timed_out = False
        try:
            process.wait(max(limit - GRACE, 0.1))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.returncode is None:
                _end(process)
        log.seek(0)
        output = shorten(log.read().decode("utf-8", "replace"), KEPT)
    return Done(None if timed_out else process.returncode, output, time.monotonic() - start, timed_out)


def _end(process: subprocess.Popen) -> None:
    """Interrupts the command's process group, which is its own, and kills what is left of it after ``GRACE``."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(GRACE)
    except (subprocess.TimeoutExpired, ProcessLookupError):
        pass
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nothing is left
        process.wait()


def shorten(text: str, most: int) -> str:
    """The beginning and the end of a text that is too long."""
    if len(text) <= most:
        return text
    first = most // 4
    return f"{text[:first]}\n[... {len(text) - most} characters left out ...]\n{text[first - most :]}"
