"""A PNG per study: curves over what was varied, or bars, with every seed's value."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from _reproduction.study import Measure, Study
from dcar_fast._files import write_atomically

COLUMNS = 3
Json = dict[str, Any]


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(study: Study, found: Json, path: Path, mark: str = "") -> bool:
    """One panel per measure that differs between variants, saved as PNG; False, and nothing written, where there is
    nothing to show yet. found: the study's entry in results.json; mark: is added to the title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [measure for measure in study.measures if found["summary"].get(measure.name) and _decides(measure)]
    if not shown:
        return False
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, measure in zip(axes.flat, shown, strict=False):
        by_variant = found["summary"][measure.name]
        if study.axis is None:
            _bars(axis, study, by_variant)
        else:
            _curves(axis, study, by_variant)
        axis.set_title(measure.label, fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{study.title}{mark}", fontsize=11)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))
    plt.close(figure)
    return True


def _decides(measure: Measure) -> bool:
    return measure.higher is not None


def _bars(axis: Any, study: Study, by_variant: dict[str, Json]) -> None:
    """A mean with its standard deviation and a dot per seed, for each variant; the axis need not begin at 0."""
    names = [variant for variant in study.variants if variant in by_variant]
    for x, name in enumerate(names):
        entry = by_variant[name]
        axis.errorbar([x], [entry["mean"]], yerr=[entry["std"] or 0.0], fmt="o", capsize=4)
        axis.plot([x] * len(entry["values"]), list(entry["values"].values()), ".", color="black", alpha=0.5)
    axis.set_xticks(range(len(names)), [name.replace(", ", ",\n").replace(" + ", " +\n") for name in names])
    axis.set_xlim(-0.5, len(names) - 0.5)


def _curves(axis: Any, study: Study, by_variant: dict[str, Json]) -> None:
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for variant in study.variants:
        if variant in by_variant:
            x, curve = study.axis(variant)
            entry = by_variant[variant]
            curves.setdefault(curve, []).append((x, entry["mean"], entry["std"] or 0.0))
    for curve, points in curves.items():
        x, means, deviations = zip(*sorted(points), strict=True)
        axis.errorbar(x, means, yerr=deviations, marker="o", markersize=4, capsize=3, label=curve or None)
    if len(curves) > 1:
        axis.legend(fontsize=8)
    axis.set_xlabel(study.axis_label, fontsize=9)
