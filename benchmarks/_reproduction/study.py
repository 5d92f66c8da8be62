"""What a study is: variants measured with several seeds, what to measure, and what to look for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from _reproduction.spread import Finding

if TYPE_CHECKING:
    from _reproduction.context import Context

Outcome = dict[str, dict[str, float]]
"""What a part measures: by variant and measure."""
Part = Callable[["Context", int], Outcome]
"""Takes the seed; one part measures one variant or, where times are compared or work is shared, several."""


@dataclass(frozen=True)
class Measure:
    """A column of the tables. higher: whether more is better, None where it is neither; worst: its bad end."""

    name: str
    label: str
    decimals: int
    higher: bool | None
    worst: float | None = None


SHAPES_EVAL = Measure("shapes_eval", "ShapesEval, %", 1, True, worst=0.0)
SECONDS = Measure("seconds_per_image", "seconds per image", 4, False)


@dataclass(frozen=True)
class Study:
    """``parts`` by name give the values of ``variants``.

    question: what the paper says or leaves open; note: how it is asked here. axis: of a variant in the plot, a number
    and the curve's name; none: bars. trained: whether it needs the trained model.
    """

    name: str
    title: str
    question: str
    note: str
    variants: tuple[str, ...]
    parts: Mapping[str, Part]
    measures: tuple[Measure, ...]
    findings: tuple[Finding, ...]
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    axis: Callable[[str], tuple[float, str]] | None = None
    axis_label: str = ""
    trained: bool = True

    def measure(self, name: str) -> Measure:
        """The measure of that name."""
        return next(measure for measure in self.measures if measure.name == name)
