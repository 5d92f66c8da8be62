"""The rows of a benchmark, each in a process of its own: separate memory peaks, separate compilations."""

from __future__ import annotations

import multiprocessing
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from _report import note
from _work import RowSpec, Workload


class RowFailed(Exception):
    """A row that cannot do what it was asked, with the reason in one line."""


class Row(ABC):
    """A row, and what was measured of it. ``call`` asks its session, which somebody else runs."""

    def __init__(self, spec: RowSpec) -> None:
        self.spec = spec
        self.unavailable: str | None = None
        self.first: dict[str, float | None] = {}
        self.seconds: list[float] = []
        self.stages: list[dict[str, float]] = []
        self.peak: int | None = None
        self.remarks: list[str] = []

    @property
    def name(self) -> str:
        return self.spec.name

    @abstractmethod
    def call(self, method: str, *arguments: Any) -> Any:
        """The session's answer; ``RowFailed`` if it raised or its process died."""

    def close(self) -> None:  # noqa: B027 - a session in this process has nothing to end
        """Ends the session."""


class OwnProcess(Row):
    """The session runs in a process that is started for it."""

    def __init__(self, spec: RowSpec, work: Workload, folder: str) -> None:
        super().__init__(spec)
        from _session import serve

        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, spec, work, folder, time.time()), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
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


class SameProcess(Row):
    """The session runs in this process, which a profiler was attached to."""

    def __init__(self, spec: RowSpec, work: Workload, folder: str) -> None:
        super().__init__(spec)
        from _session import Session

        self._session = Session(spec, work, folder)

    def call(self, method: str, *arguments: Any) -> Any:
        from _session import explain

        try:
            return getattr(self._session, method)(*arguments)
        except Exception as error:  # as in a process of its own
            reason, trace = explain(error, self.spec)
            note(trace.rstrip())
            raise RowFailed(reason) from None


@dataclass
class Rows:
    """The rows of one benchmark; those that fail on the way drop out of ``able`` but stay in the results."""

    all: list[Row] = field(default_factory=list)

    @property
    def able(self) -> list[Row]:
        return [row for row in self.all if row.unavailable is None]

    def call(self, method: str, *arguments: Any, among: Sequence[Row] | None = None) -> dict[Row, Any]:
        """The answers of the able rows, or of those ``among`` them, asked one after the other."""
        answers = {}
        for row in self.able if among is None else [row for row in self.able if row in among]:
            try:
                answers[row] = row.call(method, *arguments)
            except RowFailed as reason:
                row.unavailable = str(reason)
                row.close()
                note(f"{row.name} is unavailable: {reason}")
        return answers
