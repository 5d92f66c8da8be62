"""What the suite runs: a step is one command and a judgement on its output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from _suite.judge import Outcome
from _suite.process import Done

PYTHON = sys.executable


@dataclass(frozen=True)
class Step:
    """One command. ``limit``: its seconds at most; ``least``: what must be left of the suite's time to begin it;
    ``missing``: why it cannot run here."""

    name: str
    part: str
    command: tuple[str, ...]
    judge: Callable[[Done], Outcome]
    limit: float
    least: float = 10
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None


class Plan(NamedTuple):
    """What the steps depend on. ``tools``: paths by name, from the environment part."""

    device: str
    quick: bool
    out: Path
    scratch: Path
    tools: Mapping[str, str | None]
    no_gpu: str | None
    ops: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[str, str]:
        """Options: the first command that needs random weights draws them, the others load them."""
        return "--weights", str(self.scratch / "weights")

    @property
    def small(self) -> bool:
        return self.quick or self.device == "cpu"


def gpu_needed(plan: Plan) -> str | None:
    """Why a step that needs a GPU cannot run here."""
    return f"needs a GPU: {plan.no_gpu}" if plan.device == "cpu" else None
