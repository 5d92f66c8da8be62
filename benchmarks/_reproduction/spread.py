"""Means over seeds, their spread, and the one rule by which a finding shows, does not show or is reversed.

All variants of a study are measured with the same seeds: x[v, s]. What is left of x when the variant's and the seed's
mean are taken out is the pooled spread, s^2 = sum of squares / ((k - 1) (n - 1)) for k variants and n seeds. A
difference of two means counts if it exceeds the margin t s sqrt(2 / n), t the two-sided 95 % quantile of Student's
distribution, divided among a finding's comparisons (Bonferroni): about two standard errors of the difference where
there are many variants, 4.3 of them for two variants and three seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHOWS, DOES_NOT_SHOW, REVERSED = "shows", "does not show", "is reversed"
UNFINISHED, ONE_SEED = "unfinished", "one seed has no spread"
LEVEL = 0.05
RULE = (
    "A difference of means counts if it exceeds the margin: Student's two-sided 95 % quantile times the standard error "
    "of a difference, from the spread that all variants of the study leave when their means and the seeds' means are "
    "taken out; the 5 % are divided among the comparisons of a finding."
)

Values = Mapping[str, Mapping[int, float]]
"""Of one measure: by variant and seed."""


@dataclass(frozen=True)
class Finding:
    """Something to look for.

    kind "better": ``variant`` beats every one of ``others`` in ``measure``; "optimum": no other variant beats it, and
    it beats every one of ``others``, the ends of the sweep; "not worse": it is worse than none of ``others`` by
    ``tolerance`` or more.
    """

    text: str
    measure: str
    kind: str
    variant: str
    others: tuple[str, ...]
    tolerance: float = 0.0


def summary(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one seed), least and largest, and the values by seed."""
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "min": min(numbers),
        "max": max(numbers),
        "values": {str(seed): value for seed, value in values.items()},
    }


def pooled_spread(values: Values) -> tuple[float, int]:
    """The pooled spread s and its degrees of freedom, see above; every variant must have the same seeds, two or more,
    and there must be two variants or more (``ValueError``)."""
    variants, seeds = list(values), sorted(next(iter(values.values()), {}))
    if len(variants) < 2 or len(seeds) < 2 or any(sorted(row) != seeds for row in values.values()):
        raise ValueError(f"values must have at least two variants of the same two seeds or more, got {values!r:.200}")
    rows = {v: statistics.fmean(values[v].values()) for v in variants}
    columns = {s: statistics.fmean(values[v][s] for v in variants) for s in seeds}
    mean = statistics.fmean(rows.values())
    squares = sum((values[v][s] - rows[v] - columns[s] + mean) ** 2 for v in variants for s in seeds)
    degrees = (len(variants) - 1) * (len(seeds) - 1)
    return math.sqrt(squares / degrees), degrees


def judge(
    finding: Finding,
    values: Values,
    seeds: Sequence[int],
    higher: bool,
    wanted: Sequence[str],
    worst: float | None = None,
) -> dict[str, Any]:
    """The verdict on a finding and what it is made of.

    values: of its measure; wanted: the variants that must be there; higher: whether more is better; worst: the
    measure's bad end, if it has one. "differences": by other variant, mean of the finding's variant minus its, positive
    where the finding's is better; "margin": the least one that counts, None without a spread; "blind": why nothing
    could be seen, None if something could.
    """
    head = {"text": finding.text, "measure": finding.measure, "kind": finding.kind, "variant": finding.variant}
    head |= {"tolerance": finding.tolerance, "seeds": len(seeds), "differences": {}, "margin": None, "spread": None}
    head["blind"] = None
    if any(set(seeds) - set(values.get(variant, {})) for variant in wanted):
        return head | {"verdict": UNFINISHED}
    table = {variant: {seed: values[variant][seed] for seed in seeds} for variant in wanted}
    means = {variant: statistics.fmean(row.values()) for variant, row in table.items()}
    compared = [v for v in wanted if v != finding.variant] if finding.kind == "optimum" else list(finding.others)
    sign = 1.0 if higher else -1.0
    differences = {other: sign * (means[finding.variant] - means[other]) for other in compared}
    head["differences"] = differences
    if len(seeds) < 2:
        return head | {"verdict": ONE_SEED}
    spread, degrees = pooled_spread(table)
    quantile = student_quantile(1 - LEVEL / 2 / len(compared), degrees)
    margin = quantile * spread * math.sqrt(2 / len(seeds))
    head |= {"spread": spread, "degrees_of_freedom": degrees, "margin": margin}
    reach = [abs(means[name] - worst) for name in (finding.variant, *compared)] if worst is not None else []
    if reach and max(reach) <= finding.tolerance:
        head["blind"] = f"all are within {finding.tolerance:g} of {worst:g}, where nothing can be worse"
        return head | {"verdict": DOES_NOT_SHOW}
    if spread == 0 and not any(differences.values()):
        head["blind"] = "all are equal"
    return head | {"verdict": _verdict(finding, differences, margin)}


def _verdict(finding: Finding, differences: Mapping[str, float], margin: float) -> str:
    least = -finding.tolerance if finding.kind == "not worse" else 0.0
    needed = [differences[other] for other in finding.others]
    if any(difference + margin < least for difference in differences.values()):
        return REVERSED
    return SHOWS if all(difference - margin > least for difference in needed) else DOES_NOT_SHOW


def overall(verdicts: Sequence[str]) -> str:
    """Of a study: reversed if one of its findings is, shown if all are; a finding that is not done leaves it open."""
    for verdict in (UNFINISHED, ONE_SEED, REVERSED, DOES_NOT_SHOW):
        if verdict in verdicts:
            return verdict
    return SHOWS


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's distribution for 0.5 < probability < 1 and an integer number of degrees of freedom."""
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(f"needs 0.5 < probability < 1 and degrees >= 1, got {probability} and {degrees}")
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, degrees: int) -> float:
    """For t >= 0: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total, k = (term if degrees > 1 else 0.0), (3 if odd else 2)
    while k <= degrees - 2:
        term *= square * (k - 1) / k
        total += term
        k += 2
    area = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + area / 2
