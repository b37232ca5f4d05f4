"""The figures of runs/teacher_intervention_table.py: held-out loss over steps, errors by depth, sharpness, for each task that has numbers.

Rows keep one colour (Okabe and Ito's), marker and line everywhere, and each has its name beside it. A line is the mean over seeds, a band goes from
the smallest to the largest. Next to loss and errors stands the ratio to plain's of the same seed, since rows may differ by far less than the loss
falls. The axis of the loss's ratio is made for the second half of the run; what is off it in the first half leaves the panel.
"""

from __future__ import annotations

import io
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image
from teacher_intervention_runs import Runs, curve, number, setting

from qatlas.report.svg import LIGHT, STYLE, WIDTH

LOOK: dict[str, dict[str, Any]] = {"plain": {"color": LIGHT["full"], "marker": "s", "linestyle": (0, (4, 2))},
                                   "restart": {"color": "#d55e00", "marker": "D", "linestyle": (0, (1, 1))},
                                   "TI-O": {"color": "#009e73", "marker": "^"}, "TI-M": {"color": "#cc79a7", "marker": "v"},
                                   "TI-G": {"color": "#0072b2", "marker": "o", "linewidth": 2.2}}
Points = dict[str, dict[int, dict[int, float]]]                   # row -> seed -> x -> y
Line = list[tuple[float, float, float, float]]                    # x, mean, smallest, largest


def save(runs: Runs, folder: Path) -> list[tuple[Path, str]]:
    """teacher_intervention_<name>.png for each figure that the runs have numbers for, and what it shows in words."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with matplotlib.rc_context(STYLE):
        for name, (draw, words) in FIGURES.items():
            figure = draw(runs)
            if figure is not None:
                found.append((folder / f"teacher_intervention_{name}.png", words))
                _write(figure, found[-1][0])
    return found


def _write(figure: Figure, path: Path) -> None:
    """A PNG with a palette: a quarter of the bytes."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def loss(runs: Runs) -> Figure | None:
    """Held-out loss over steps, and its ratio to plain's."""
    return _beside({task: {row: {seed: {step: held for step, _, held in curve(run)} for seed, run in of.items() if run["curve"]}
                           for row, of in rows.items()} for task, rows in runs.items()}, runs, "held-out loss", "step", 0.5)


def depth(runs: Runs) -> Figure | None:
    """Mean squared error of the blocks' outputs against the teacher's, by depth, and its ratio to plain's."""
    return _beside({task: {row: {seed: dict(enumerate(run["depth"], 1)) for seed, run in of.items() if run.get("depth")} for row, of in rows.items()}
                    for task, rows in runs.items()}, runs, "MSE of the block's output", "block", 0.0)


def _beside(tasks: dict[str, Points], runs: Runs, what: str, along: str, since: float) -> Figure | None:
    """A row of panels for each task: what it is, and divided by plain's; the ratio's axis is made for what comes after `since` of the whole."""
    tasks = {task: points for task, points in tasks.items() if any(points.values())}
    if not tasks:
        return None
    fig = Figure(figsize=(WIDTH, 0.7 + 1.95 * len(tasks)), layout="constrained")
    axes = fig.subplots(len(tasks), 2, squeeze=False)
    for (left, right), (task, points) in zip(axes, tasks.items(), strict=True):
        lines, ratios = _lines(points), _lines(_divided(points))
        end = max(x for line in lines.values() for x, *_ in line)
        first = setting(runs[task], "first") if along == "step" else None
        for ax, drawn in ((left, lines), (right, ratios)):
            for row, line in drawn.items():
                _draw(ax, row, line)
            if first:
                ax.axvline(first, color=LIGHT["muted"], linewidth=0.8, linestyle=":")
            ax.set_xlim(0 if along == "step" else 0.8, 1.02 * end + (along == "block") * 0.1)
            ax.xaxis.set_major_locator(MaxNLocator(5 if along == "step" else 8, integer=True))
            ax.grid(axis="y")
        _height(left, lines)
        late = [y for line in ratios.values() for x, *ys in line if x >= since * end for y in ys if math.isfinite(y)]
        low, high = min([*late, 1.0]), max([*late, 1.0])
        pad = max(0.15 * (high - low), 0.005)
        right.set_ylim(low - pad, high + pad)
        left.set_title(f"{task}: {what}" + ", log scale" * (left.get_yscale() == "log"))
        right.set_title(f"{task}: divided by plain's" if late else f"{task}: no run of plain to divide by")
        _names(right, ratios)
        if first:
            left.annotate("first part ends", (first, 0), xycoords=("data", "axes fraction"), xytext=(4, 3), textcoords="offset points",
                          fontsize=7.5, color=LIGHT["muted"])
    for ax in axes[-1]:
        ax.set_xlabel(along)
    _legend(fig, tasks)
    return fig


def _divided(points: Points) -> Points:
    """Each run divided by plain's of the same seed, where both have a point."""
    plain = points["plain"]
    return {row: {seed: {x: y / plain[seed][x] for x, y in at.items() if plain[seed].get(x)} for seed, at in of.items() if seed in plain}
            for row, of in points.items()}


def _height(ax: Axes, lines: dict[str, Line]) -> None:
    """From 0, or on a log scale where values differ by more than fifty times."""
    values = [y for line in lines.values() for _, *ys in line for y in ys if math.isfinite(y) and y > 0]
    if values and max(values) > 50 * min(values):
        ax.set_yscale("log")
        ax.set_ylim(min(values) / 1.5, max(values) * 1.5)
        ax.yaxis.set_major_locator(LogLocator(numticks=6))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    else:
        ax.set_ylim(0, 1.06 * max(values, default=1.0))


def sharpness(runs: Runs) -> Figure | None:
    """The Hessian's eigenvalue of largest size, seed 0."""
    tasks = {task: {row: of[0]["sharpness"] for row, of in rows.items() if of.get(0, {}).get("sharpness") is not None} for task, rows in runs.items()}
    tasks = {task: bars for task, bars in tasks.items() if bars}
    if not tasks:
        return None
    fig, axes = _grid(len(tasks), 3, 1.75)
    for ax, (task, bars) in zip(axes, tasks.items(), strict=True):
        finite = [x for x in bars.values() if math.isfinite(x)]
        ax.barh(range(len(bars)), [x if math.isfinite(x) else 0 for x in bars.values()], height=0.64, color=[LOOK[row]["color"] for row in bars])
        span = max([*finite, 0]) - min([*finite, 0]) or 1.0
        ax.set_xlim(min([*finite, 0]) - (0.42 * span if min([*finite, 0]) < 0 else 0), max([*finite, 0]) + 0.42 * span)
        for at, x in enumerate(bars.values()):
            ax.annotate(number(x, 3), (x if math.isfinite(x) else 0, at), xytext=(4 if not x < 0 else -4, 0), textcoords="offset points", va="center",
                        ha="left" if not x < 0 else "right", fontsize=8.5, fontweight="bold")
        ax.set_yticks(range(len(bars)), list(bars), color=LIGHT["ink"])
        ax.set_ylim(len(bars) - 0.5, -0.5)
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
        ax.set_title(task)
    fig.supxlabel("eigenvalue of largest size of the Hessian of the held-out loss, seed 0 (each panel has its own scale)", fontsize=9,
                  color=LIGHT["muted"])
    return fig


def _lines(points: Points) -> dict[str, Line]:
    """Row -> mean and range over the seeds at each x that they all have."""
    found = {}
    for row, of in points.items():
        shared = sorted(set.intersection(*map(set, of.values()))) if of else []
        if shared:
            found[row] = [(x, statistics.fmean(ys), min(ys), max(ys)) for x in shared for ys in [[at[x] for at in of.values()]]]
    return found


def _draw(ax: Axes, row: str, line: Line) -> None:
    x, mean, low, high = zip(*line, strict=True)
    ax.fill_between(x, low, high, color=LOOK[row]["color"], alpha=0.15, linewidth=0)
    ax.plot(x, mean, **{"linewidth": 1.4, "markersize": 3.5, **LOOK[row]}, zorder=3 if row == "TI-G" else 2)


def _names(ax: Axes, lines: dict[str, Line]) -> None:
    """Each row's name right of its line's end, moved apart where ends are close."""
    ends = {row: [ax.transLimits.transform(ax.transScale.transform((line[-1][0], line[-1][1])))] for row, line in lines.items()
            if math.isfinite(line[-1][1])}
    height = {row: min(max(float(y), 0.0), 1.0) for row, [(_, y)] in ends.items()}
    for row, at in apart(height, 0.155).items():
        ax.annotate(row, (float(ends[row][0][0]), height[row]), xycoords="axes fraction", xytext=(1.1, at), textcoords="axes fraction", va="center",
                    fontsize=8.5, annotation_clip=False,
                    arrowprops={"arrowstyle": "-", "color": LOOK[row]["color"], "linewidth": 0.9, "shrinkA": 1, "shrinkB": 2})


def apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Places from 0 to 1 at least a gap apart, in the order of the heights and near them.

    >>> {name: round(x, 2) for name, x in apart({"a": 0.5, "b": 0.5, "c": 0.0, "d": 0.99}, 0.2).items()}
    {'c': 0.0, 'a': 0.4, 'b': 0.6, 'd': 0.99}
    """
    groups: list[list[str]] = []

    def centre(group: list[str]) -> float:
        half = gap * (len(group) - 1) / 2
        return min(max(statistics.fmean(heights[name] for name in group), half), 1 - half)

    for name in sorted(heights, key=lambda name: heights[name]):
        groups.append([name])
        while len(groups) > 1 and centre(groups[-1]) - centre(groups[-2]) < gap * (len(groups[-1]) + len(groups[-2])) / 2 - 1e-9:
            groups[-2:] = [groups[-2] + groups[-1]]
    return {name: centre(group) + gap * (i - (len(group) - 1) / 2) for group in groups for i, name in enumerate(group)}


def _grid(n: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with n panels."""
    columns = min(n, columns)
    down = -(-n // columns)
    fig = Figure(figsize=(WIDTH, 0.6 + height * down), layout="constrained")
    axes = list(fig.subplots(down, columns, squeeze=False).flat)
    for ax in axes[n:]:
        ax.remove()
    return fig, axes[:n]


def _legend(fig: Figure, tasks: dict[str, Points]) -> None:
    rows = [row for row in LOOK if any(points.get(row) for points in tasks.values())]
    marks = [Line2D([], [], label=row, **{"linewidth": 1.4, "markersize": 4.5, **LOOK[row]}) for row in rows]
    fig.legend(handles=marks, loc="outside upper center", ncols=len(rows), handlelength=3.2)
    fig.get_layout_engine().set(w_pad=0.08)


FIGURES: dict[str, tuple[Any, str]] = {
    "loss": (loss, "Held-out loss of imitation over steps, a row of panels for each task: left the loss, right the loss divided by plain's of the "
                   "same seed; mean and range over seeds; the tables say where they end"),
    "depth": (depth, "Mean squared error of each block's output against the teacher's by depth, a row of panels for each task: left the error, right "
                     "the error divided by plain's of the same seed; mean and range over seeds"),
    "sharpness": (sharpness, "Bar charts of the eigenvalue of largest size of the Hessian of the held-out loss, a panel for each task; the numbers "
                             "are in the tables"),
}
