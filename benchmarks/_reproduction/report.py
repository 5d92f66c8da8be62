"""results.json from the cells, and tables.md from results.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from _suite.report import grid

from _reproduction.spread import RULE, judge, overall, summary
from _reproduction.study import Study

Json = dict[str, Any]


def values_of(study: Study, cells: Sequence[Json], seeds: Sequence[int]) -> dict[str, dict[str, dict[int, float]]]:
    """By measure, variant and seed, of the study's cells with these seeds."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        if cell["study"] != study.name or cell["seed"] not in seeds:
            continue
        for variant, measures in cell["outcome"].items():
            for measure, value in measures.items():
                found.setdefault(measure, {}).setdefault(variant, {})[cell["seed"]] = value
    return found


def study_result(study: Study, cells: Sequence[Json], seeds: Sequence[int]) -> Json:
    """Summaries, findings and the verdict of a study."""
    values = values_of(study, cells, seeds)
    own = [cell for cell in cells if cell["study"] == study.name and cell["seed"] in seeds]
    found = []
    for finding in study.findings:
        measure = study.measure(finding.measure)
        of_it = values.get(measure.name, {})
        found.append(judge(finding, of_it, seeds, bool(measure.higher), study.variants, measure.worst))
    return {
        "name": study.name,
        "title": study.title,
        "question": study.question,
        "note": study.note,
        "seeds": list(seeds),
        "variants": list(study.variants),
        "measures": [
            {"name": m.name, "label": m.label, "decimals": m.decimals, "higher": m.higher} for m in study.measures
        ],
        "paper": {figure: dict(row) for figure, row in study.paper.items()},
        "summary": {
            measure: {variant: summary(by_seed) for variant, by_seed in rows.items()}
            for measure, rows in values.items()
        },
        "findings": found,
        "verdict": overall([finding["verdict"] for finding in found]),
        "cells_done": len(own),
        "cells": len(study.parts) * len(seeds),
        "seconds": sum(cell["seconds"] for cell in own),
    }


def complete_seeds(study: Study, cells: Sequence[Json]) -> list[int]:
    """The seeds of which all parts are done; where there is none, all that were begun."""
    parts: dict[int, set[str]] = {}
    for cell in cells:
        if cell["study"] == study.name:
            parts.setdefault(cell["seed"], set()).add(cell["part"])
    return sorted(seed for seed, done in parts.items() if done >= set(study.parts)) or sorted(parts)


def results(head: Json, studies: Sequence[tuple[Study, Sequence[int]]], cells: Sequence[Json]) -> Json:
    """Everything; head: what was run, where and how; studies: with the seeds over which each is summed up."""
    return {
        "benchmark": "reproduction",
        **head,
        "rule": RULE,
        "studies": [study_result(study, cells, seeds) for study, seeds in studies],
        "cells": list(cells),
    }


def tables(found: Json) -> str:
    """Markdown; every number in it is one of ``found``, the contents of results.json, rounded."""
    environment = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    lines = ["# The paper's findings, repeated in small", ""]
    if found["quick"]:
        lines += ["**Quick: toy budgets, to see that everything runs. These numbers mean nothing.**", ""]
    lines += [
        f"`{environment['command']}` on {environment['device']}; {versions}; commit {environment['commit']}, "
        f"{environment['time']}.",
        "",
        f"Mean ± sample standard deviation over the seeds (least .. largest). {found['rule']}",
        "",
    ]
    commits = sorted({str(cell["environment"]["commit"]) for cell in found["cells"]})
    if commits and commits != [str(environment["commit"])]:
        lines += [f"Cells were measured at the commits {', '.join(commits)}.", ""]
    lines += [line for name, why in found["failures"].items() for line in (f"**Failed: {name}: {why}**", "")]
    lines += [*grid(("study", "verdict", "seeds", "cells done", "of", "seconds"), map(_row, found["studies"])), ""]
    for study in found["studies"]:
        lines += [f"## {study['title']}", "", study["question"], study["note"], "", *study_tables(study), ""]
    return "\n".join(lines)


def _row(study: Json) -> tuple[str, ...]:
    """A study in the overview; seconds: wall time of its cells."""
    counts = (", ".join(map(str, study["seeds"])), str(study["cells_done"]), str(study["cells"]))
    return (study["title"], study["verdict"], *counts, f"{study['seconds']:.0f}")


def study_tables(study: Json) -> list[str]:
    """The measured values beside the paper's, and what they show."""
    header = ["variant", *(m["label"] for m in study["measures"]), *(f"paper: {figure}" for figure in study["paper"])]
    rows = []
    for variant in study["variants"]:
        ours = [_value(study["summary"].get(m["name"], {}).get(variant), m["decimals"]) for m in study["measures"]]
        theirs = [_paper(figure, row[variant]) if variant in row else "" for figure, row in study["paper"].items()]
        rows.append((variant, *ours, *theirs))
    lines = [*grid(header, rows), ""]
    found = [
        (f["text"], f["variant"], _labels(study)[f["measure"]], _differences(f, study), f["verdict"])
        for f in study["findings"]
    ]
    lines += grid(("finding", "variant", "in", "better by (what counts)", "verdict"), found)
    lines += ["", f"Together: **{study['verdict']}**.", *(_blind(f, study) for f in study["findings"])]
    return [line for line in lines if line is not None]


def _paper(figure: str, value: float) -> str:
    """With the digits that the paper gives."""
    return f"{value:.2f}" if "FID" in figure else f"{value:g}"


def _labels(study: Json) -> dict[str, str]:
    return {m["name"]: m["label"] for m in study["measures"]}


def _decimals(finding: Json, study: Json) -> int:
    return next(m["decimals"] for m in study["measures"] if m["name"] == finding["measure"])


def _value(found: Json | None, decimals: int) -> str:
    """Such as "31.20 ± 0.12 (31.06 .. 31.30)"."""
    if found is None:
        return ""
    if found["std"] is None:
        return f"{found['mean']:.{decimals}f}"
    mean, std, least, most = (f"{found[name]:.{decimals}f}" for name in ("mean", "std", "min", "max"))
    return f"{mean} ± {std} ({least} .. {most})"


def _differences(finding: Json, study: Json) -> str:
    decimals = _decimals(finding, study)
    parts = [f"than {other}: {value:+.{decimals}f}" for other, value in finding["differences"].items()]
    if finding["margin"] is None:
        return "; ".join(parts)
    allowed = f", {finding['tolerance']:g} less is allowed" if finding["kind"] == "not worse" else ""
    return "; ".join(parts) + f" ({finding['margin']:.{decimals}f}{allowed})"


def _blind(finding: Json, study: Json) -> str | None:
    """What could not have been seen, where nothing was."""
    if finding["verdict"] != "does not show":
        return None
    if finding["blind"]:
        return f"\nNot decided: {finding['text']}: {finding['blind']}."
    decimals = _decimals(finding, study)
    return (
        f"\nNot decided: {finding['text']}. With {finding['seeds']} seeds and a pooled spread of "
        f"{finding['spread']:.{decimals}f} a difference below {finding['margin']:.{decimals}f} cannot be "
        "told from none."
    )
