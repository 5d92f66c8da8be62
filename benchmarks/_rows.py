"""The rows of a benchmark, each in a process of its own: separate memory peaks, separate compilations."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, field
from typing import Any

from _report import note


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
