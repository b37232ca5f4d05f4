"""Scores by stage, and bytes by artefact: horizontal bars with their numbers beside them.

Perplexity over orders of magnitude stands on a log axis whose floor is 1, the perplexity of certainty: the length of a bar is then the loss in nats,
and comparing lengths stays honest. Every other axis starts at 0. What is not finite has no bar; its row says so in words.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .numbers import FULL, finite, headline, number, plain, real, size, smaller
from .svg import HUGE, LIGHT, WIDTH, color

if TYPE_CHECKING:
    from ..record import Record


def scores(record: Record) -> Figure:
    metric, rows = scored(record)
    values = [value for _, value in rows]
    shown = [min(v, HUGE) for v in values if v is not None and math.isfinite(v)]
    log = metric.lower and len(shown) > 1 and min(shown) >= 1 and max(shown) / min(shown) > 20
    fig, ax = _bars([name for name, _ in rows], [_drawn(v, 1.0 if log else 0.0) for v in values], [metric.say(v) for v in values])
    top, bottom = max(shown, default=1.0), min([0.0, *shown])
    if log:
        ax.set_xscale("log")
        ax.set_xlim(1, top ** 1.13)
        ax.xaxis.set_major_locator(LogLocator(numticks=7))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x < 1e6 else f"1e{round(math.log10(x))}"))
    else:
        ax.set_xlim(bottom * 1.2, (top or 1.0) * 1.2)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %" if metric.share else number(round(x, 9))))
    ax.set_xlabel(f"{metric.name}{', log scale' if log else ''} ({'lower' if metric.lower else 'higher'} is better)")
    _level(ax, dict(rows).get(FULL))
    return fig


def scored(record: Record) -> tuple[Any, list[tuple[str, float | None]]]:
    metric = headline(record)
    return metric, [(name, real((metrics or {}).get(metric.name))) for name, metrics in record.scores.items()] if metric else []


def _level(ax: Axes, value: float | None) -> None:
    """A dashed line through all bars, at full precision."""
    if finite(value) is not None and abs(float(value or 0)) < HUGE:
        ax.axvline(float(value or 0), color=LIGHT["full"], linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)


def has_scores(record: Record) -> bool:
    return any(x is not None for _, x in scored(record)[1])


def scores_in_words(record: Record) -> str:
    metric, rows = scored(record)
    return f"Bar chart of {metric.name} by stage: " + "; ".join(f"{plain(name)} {metric.say(value)}" for name, value in rows) + "."


def sizes(record: Record) -> Figure:
    rows = sized(record)
    words = [size(n) + ("" if name == FULL or FULL not in dict(rows) else f"  ·  {smaller(n, dict(rows)[FULL])}") for name, n in rows]
    fig, ax = _bars([name for name, _ in rows], [n for _, n in rows], words)
    top = max(n for _, n in rows)
    ax.set_xlim(0, top * 1.12)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: re.sub(r"\.0+ ", " ", size(x)) if x else "0"))
    ax.set_xlabel("size of the weights on disk")
    return fig


def sized(record: Record) -> list[tuple[str, float]]:
    pairs = [(name, finite(n)) for name, n in record.sizes.items()]
    return [(name, n) for name, n in pairs if n is not None and n > 0]


def has_sizes(record: Record) -> bool:
    return len(sized(record)) > 1


def sizes_in_words(record: Record) -> str:
    return "Bar chart of sizes: " + "; ".join(f"{plain(name)} {size(n)}" for name, n in sized(record)) + "."


def _bars(names: list[str], lengths: list[float], words: list[str]) -> tuple[Figure, Axes]:
    """Horizontal bars, a row each, with their numbers beside them."""
    fig = Figure(figsize=(WIDTH, 0.75 + 0.36 * len(names)), layout="constrained")
    ax = fig.subplots()
    ax.barh(range(len(names)), lengths, height=0.62, color=[color(name) for name in names])
    for row, (length, word) in enumerate(zip(lengths, words, strict=True)):
        ax.annotate(word, (max(length, 0.0), row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, fontweight="bold",
                    bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1.0})
    ax.set_yticks(range(len(names)), [plain(name, 36) for name in names], color=LIGHT["ink"], fontsize=9)
    ax.set_ylim(len(names) - 0.45, -0.55)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    return fig, ax


def _drawn(value: float | None, floor: float) -> float:
    return max(min(value, HUGE), -HUGE) if value is not None and math.isfinite(value) else floor
