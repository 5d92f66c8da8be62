"""The curves of trainings, from the metrics.jsonl in their output folders.

    python benchmarks/training_curves.py runs/shapes-generator -o curves.png --metrics token_loss diffusion_loss

One panel per metric, one line per run, over the steps. Without --metrics: everything that the first run logged but
rates and times. Needs matplotlib (pip install -e ".[bench]").
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from dcar_fast._files import write_atomically

ASIDE = {"step", "seconds", "images_per_second", "waiting_for_data", "learning_rate", "discriminator_learning_rate"}
COLUMNS = 3


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of ``run``/metrics.jsonl, or of a file of that kind; of a step that was logged twice (a resumed run)
    the last. ``ValueError`` if there are none."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise ValueError(f"{path} does not exist: no training has written there")
    lines: dict[int, dict[str, float]] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            lines[line["step"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no line of a training's log: {text[:60]!r}") from error
    if not lines:
        raise ValueError(f"{path} is empty")
    return [lines[step] for step in sorted(lines)]


def draw(runs: dict[str, list[dict[str, float]]], metrics: list[str], output: Path) -> None:
    """One panel per metric, saved as PNG."""
    import matplotlib.pyplot as plt

    columns = min(COLUMNS, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    for axis, metric in zip(axes.flat, metrics, strict=False):
        for name, lines in runs.items():
            points = [(line["step"], line[metric]) for line in lines if metric in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axis.set_title(metric.replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=8)
    write_atomically(output, lambda path: figure.savefig(path, dpi=80, format="png"))
    plt.close(figure)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of trainings, or their metrics.jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--metrics", nargs="+", help="what to draw, by its name in metrics.jsonl")
    options = parser.parse_args(args)
    try:
        runs = {run.stem if run.is_file() else run.name: read_metrics(run) for run in options.runs}
        known = {name: None for lines in runs.values() for line in lines for name in line if name not in ASIDE}
        metrics = options.metrics or list(known)
        missing = [name for name in metrics if not any(name in line for lines in runs.values() for line in lines)]
        if missing:
            raise ValueError(f"--metrics: {missing} were not logged; there are {sorted(known)}")
        draw(runs, metrics, options.output)
    except ValueError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: pip install -e '.[bench]'")
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
