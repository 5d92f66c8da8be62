"""The picture of roofline.py.

Above: the roofline with the stages on it, and the totals. Below, one lane per stage: every operation's FLOP per byte
(area: time), and the stage's floor, beside it what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
from _roofline import BYTE_UNITS, COLOURS, FLOP_UNITS, SECOND_UNITS, Measured, Stage, quantity, unit_of
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dcar_fast import flops
from dcar_fast._files import write_atomically

INK, GREY, LIGHT, SHADE = "#20242a", "#7b828c", "#e8eaed", "#f3f4f6"
STYLE = {"font.size": 12, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK}
STYLE |= {"ytick.color": INK, "hatch.linewidth": 1.4, "font.family": "DejaVu Sans"}


@dataclass(frozen=True)
class Picture:
    """What is drawn. rates: bytes per element, FLOP/s, bytes/s. measured: a row of a benchmark, if there is one."""

    ops: dict[str, list[flops.Op]]
    stages: list[Stage]
    whole: Stage
    batch: int
    work: str
    ceilings: str
    rates: tuple[int, float, float]
    measured: Measured | None = None
    every: list[float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", [self.intensity(op) for parts in self.ops.values() for op in parts])

    @property
    def ridge(self) -> float:
        """FLOP per byte from which on arithmetic is the bound."""
        return self.rates[1] / self.rates[2]

    def intensity(self, op: flops.Op) -> float:
        return op.flops / ((op.weights + op.activations) * self.rates[0])

    def share(self, op: flops.Op) -> float:
        return flops.floor([op], *self.rates) / self.whole.floor


def draw(path: Path, picture: Picture) -> None:
    """Writes the PNG."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(14, 8.6), dpi=140)
        grid = figure.add_gridspec(
            2, 2, height_ratios=(1, 1.35), left=0.125, right=0.975, top=0.845, bottom=0.085, hspace=0.16, wspace=0.06
        )
        roof, totals = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        lanes = figure.add_subplot(grid[1, 0], sharex=roof)
        bars = figure.add_subplot(grid[1, 1], sharey=lanes)
        title = "What one batch must cost" + (", and what it costs" if picture.measured else "")
        figure.text(0.018, 0.965, title, fontsize=20, weight="bold", va="center")
        figure.text(0.018, 0.92, f"{picture.work}   |   {picture.ceilings}", fontsize=12, color=GREY, va="center")
        if picture.measured:
            figure.text(0.018, 0.885, f"measured: {picture.measured.source}", fontsize=12, color=GREY, va="center")
        draw_roof(roof, picture)
        draw_lanes(lanes, picture)
        draw_bars(bars, picture)
        draw_totals(totals, picture)
        for axis in (roof, lanes, bars):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="x", which="major", color=LIGHT, lw=0.9, zorder=0)
            axis.set_axisbelow(True)
        lanes.spines["left"].set_visible(False)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
        plt.close(figure)


def shade_memory(axis: Axes, picture: Picture, low: float) -> None:
    """The half that memory bounds."""
    axis.axvspan(low, picture.ridge, color=SHADE, lw=0, zorder=0)
    axis.axvline(picture.ridge, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1)


def draw_roof(roof: Axes, picture: Picture) -> None:
    _, compute, memory = picture.rates
    ridge = picture.ridge
    low, high = min(picture.every) / 1.8, max(*picture.every, ridge) * 2.2
    shade_memory(roof, picture, low)
    roof.plot([low, ridge, high], [low * memory, compute, compute], color=INK, lw=2.2, zorder=2)
    for name, stage in zip(picture.ops, picture.stages, strict=True):
        spot = stage.flops / stage.bytes, stage.flops / stage.floor
        roof.scatter(*spot, s=110, marker="D", color=COLOURS[name], edgecolors="white", lw=1.3, zorder=4)
    slowest = min(stage.flops / stage.floor for stage in picture.stages)
    roof.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(slowest / 4, compute / 12), compute * 2.4))
    roof.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    roof.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1e12:g}"))
    roof.yaxis.set_minor_formatter(NullFormatter())
    roof.set_ylabel("TFLOP/s within reach")
    roof.tick_params(labelbottom=False)
    room = math.log(ridge / low) > 0.32 * math.log(high / low)
    roof.text(
        ridge / 1.12, compute * 1.55, "bound by memory" if room else "memory", ha="right", va="center", color=GREY
    )
    roof.text(ridge * 1.12, compute * 1.55, "bound by arithmetic", ha="left", va="center", color=GREY)
    note_at = {"transform": roof.transAxes, "ha": "right", "va": "center", "fontsize": 10, "color": GREY}
    note_at["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    roof.text(0.985, 0.07, "diamonds: whole stages, coloured as below", **note_at)


def draw_lanes(lanes: Axes, picture: Picture) -> None:
    shade_memory(lanes, picture, min(picture.every) / 1.8)
    for i, (name, parts) in enumerate(picture.ops.items()):
        lanes.axhline(i, color=LIGHT, lw=1, zorder=1)
        for op in parts:
            area = 22 + 2600 * picture.share(op)
            lanes.scatter(picture.intensity(op), i, s=area, color=COLOURS[name], alpha=0.6, lw=0, zorder=3)
        longest = max(parts, key=picture.share)
        below = i + 0.2 + 0.9 * picture.share(longest) ** 0.5
        name_at = {"fontsize": 9.5, "color": GREY, "va": "center", "ha": "center"}
        lanes.text(picture.intensity(longest), below, longest.name, **name_at)
    lanes.set_xlabel("FLOP per byte moved (dot: operation, area: time, longest named)")
    lanes.set_yticks(range(len(picture.stages)), [stage.name for stage in picture.stages], fontsize=13)
    lanes.set_ylim(len(picture.stages) - 0.35, -0.6)
    lanes.tick_params(axis="y", length=0)


def draw_bars(bars: Axes, picture: Picture) -> None:
    """The floors, with those of the memory-bound operations hatched; below each, as an outline, what was measured."""
    measured = picture.measured.lanes if picture.measured else {}
    factor, unit = unit_of(picture.whole.floor, SECOND_UNITS)
    longest = max(*(stage.floor for stage in picture.stages), *(time for time, _ in measured.values()), 0.0) / factor
    for i, (name, stage) in enumerate(zip(picture.ops, picture.stages, strict=True)):
        total, bound, colour = stage.floor / factor, stage.memory_bound / factor, COLOURS[name]
        height, middle = (0.3, i - 0.2) if measured else (0.56, i)
        bars.barh(middle, total - bound, color=colour, height=height)
        hatched = {"color": colour, "height": height, "hatch": "///", "edgecolor": "white", "lw": 0}
        bars.barh(middle, bound, left=total - bound, **hatched)
        label = f"{total:.3g} {unit}"
        detail = f"{stage.floor / picture.whole.floor:.1%},  {quantity(stage.flops, FLOP_UNITS)}"
        at, size = total + longest * 0.02, 11 if measured else 13
        if not measured:
            bars.text(at, i - 0.12, label, va="center", fontsize=size, weight="bold")
            bars.text(at, i + 0.17, detail, va="center", fontsize=10, color=GREY)
            continue
        bars.text(at, middle, f"{label}   ({detail})", va="center", fontsize=10, color=GREY)
        if name in measured:
            time, what = measured[name]
            bars.barh(i + 0.14, time / factor, height=0.3, color="none", edgecolor=colour, lw=1.8)
            text = f"{time / factor:.3g} {unit}" + (f"  {what}" if what else "")
            bars.text(time / factor + longest * 0.02, i + 0.14, text, va="center", fontsize=size, weight="bold")
    bars.set_xlim(0, longest * (1.6 if measured else 1.3))
    kinds = "filled: least, outlined: measured" if measured else "least"
    bars.set_xlabel(f"time in {unit} ({kinds}, hatched: bound by memory)")
    bars.tick_params(axis="y", labelleft=False, length=0)


def draw_totals(totals: Axes, picture: Picture) -> None:
    totals.axis("off")
    whole, rate = picture.whole, picture.batch / picture.whole.floor
    numbers = [
        (quantity(whole.floor, SECOND_UNITS), "least time"),
        (f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}", "images/s at most"),
    ]
    if picture.measured:
        numbers.append((quantity(picture.measured.seconds, SECOND_UNITS), "measured"))
        numbers.append((f"{picture.batch / picture.measured.seconds:.3g}", "images/s measured"))
    else:
        numbers.append((quantity(whole.flops, FLOP_UNITS), "arithmetic"))
        numbers.append((quantity(whole.bytes, BYTE_UNITS), "moved"))
    for i, (value, label) in enumerate(numbers):
        x, y = 0.1 + 0.47 * (i % 2), 0.78 - 0.5 * (i // 2)
        totals.text(x, y, value, fontsize=26, weight="bold", va="center", transform=totals.transAxes)
        totals.text(x, y - 0.16, label, fontsize=13, color=GREY, va="center", transform=totals.transAxes)
