"""Loss over steps, the held-out curve, and the learning rate.

Each step is a thin line, an average over a 25th of the run a thick one. The held-out curve runs from the untrained score to the trained one, in nats
where less is better; full precision and untrained are dashed levels. A training loss on another scale than the held-out score (a distance from a
teacher; an accuracy) gets a panel of its own, since one axis would compare what cannot be compared: the two share an axis when the first training
loss is within a factor of two of the untrained model's, and the last one of the trained model's. Several fits stand in a
row, a dotted line between them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .numbers import FULL, UNTRAINED, Metric, finite, headline, nats, number, ratio, real
from .svg import LIGHT, WIDTH, color

if TYPE_CHECKING:
    from ..record import Record

POINTS = 600


def training(record: Record) -> Figure:
    losses, rates, borders = steps(record)
    points, levels = held_out(record)
    metric, together = headline(record), _together(record)
    panels = ["loss"] * _any(losses) + ["held"] * (bool(points) and not together) + ["lr"] * (_any(rates) and len(set(rates)) > 1)
    heights = {"loss": 2.9, "held": 1.9, "lr": 0.7}
    fig = Figure(figsize=(WIDTH, 0.5 + sum(heights[p] for p in panels)), layout="constrained")
    axes = dict(zip(panels, fig.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[heights[p] for p in panels])[:, 0], strict=True))
    for ax in axes.values():
        ax.grid(axis="y")
        for border in borders:
            ax.axvline(border + 0.5, color=LIGHT["muted"], linewidth=0.8, linestyle=":")
    if "loss" in axes:
        _losses(axes["loss"], losses)
        axes["loss"].set_ylabel("loss" if together else "training loss")
    where = axes["loss"] if together else axes.get("held")
    if where is not None and metric is not None:
        _curve(where, points, joined=bool(record.curve))
        _levels(where, levels, metric)
        if together:
            where.legend(loc="upper center", ncols=2, handlelength=1.6)
        else:
            where.set_ylabel(f"held-out {'loss' if metric.lower else metric.name}")
            where.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %" if metric.share else f"{x:g}"))
    if "lr" in axes:
        _rates(axes["lr"], rates)
    axes[panels[-1]].set_xlabel("step")
    axes[panels[-1]].set_xlim(0, max(len(losses), *(step for step, _ in points), 1))
    fig.align_ylabels()
    return fig


def has_training(record: Record) -> bool:
    return _any(steps(record)[0]) or len(held_out(record)[0]) > 1


def _any(values: list[float]) -> bool:
    return any(finite(x) is not None for x in values)


def _together(record: Record) -> bool:
    """Whether the training loss is on the scale of the held-out one."""
    metric, losses, untrained = headline(record), steps(record)[0], finite(nats(record.scores.get(UNTRAINED) or {}))
    if metric is None or not metric.lower or not _any(losses) or not held_out(record)[0]:
        return False
    shares = [ratio(losses[0], untrained), ratio(losses[-1], finite(nats(record.scores.get("trained") or {})))]
    return all(share is not None and 0.5 < share < 2 for share in shares if share is not None or untrained is not None)


def _losses(ax: Axes, losses: list[float]) -> None:
    ax.plot(*_thin(losses), color=LIGHT["trained"], linewidth=0.8, alpha=0.4)
    ax.plot(*_thin(_smooth(losses)), color=LIGHT["trained"], linewidth=1.8, label="training")
    bad = next((step for step, x in enumerate(losses) if not math.isfinite(x)), None)
    if bad is not None:
        ax.text(0.99, 0.5, f"loss is not finite at step {bad + 1}", transform=ax.transAxes, ha="right", color=LIGHT["untrained"], fontweight="bold",
                bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 2.0})


def _curve(ax: Axes, points: list[tuple[int, float]], joined: bool) -> None:
    """The held-out points; the two ends alone are not joined, since nobody looked between them."""
    ax.plot(*zip(*points, strict=True), color=LIGHT["export"], marker="o", markersize=5, linewidth=1.4 if joined else 0, clip_on=False,
            markeredgecolor=LIGHT["paper"], label="held out", zorder=3)


def _levels(ax: Axes, levels: dict[str, float], metric: Metric) -> None:
    """Dashed lines, with their names in the right margin; the upper name rises and the lower one sinks, so that they never overlap."""
    for stage, value in levels.items():
        ax.axhline(value, color=color(stage), linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        above = value > min(levels.values()) or (stage == UNTRAINED and len(set(levels.values())) == 1)
        ax.annotate(f"{stage}\n{number(value) if metric.lower else metric.say(value)}", (1, value), xycoords=("axes fraction", "data"),
                    xytext=(7, 0), textcoords="offset points", ha="left", va=("bottom" if above else "top") if _close(levels) else "center",
                    fontsize=8.5, color=LIGHT["ink"], linespacing=1.25)
    ax.margins(y=0.1)


def _close(levels: dict[str, float]) -> bool:
    low, high = min(levels.values()), max(levels.values())
    return high - low < 0.2 * max(abs(low), abs(high))


def _rates(ax: Axes, rates: list[float]) -> None:
    peak = max((x for x in rates if math.isfinite(x)), default=0.0) or 1.0
    ax.plot(*_thin(rates), color=LIGHT["muted"], linewidth=1.1)
    ax.set_ylabel("lr")
    ax.set_ylim(0, peak * 1.15)
    ax.set_yticks([0, peak], ["0", f"{peak:.3g}" if peak >= 1e-3 else number(peak)])


def steps(record: Record) -> tuple[list[float], list[float], list[int]]:
    """Losses and learning rates of all fits in a row, and the steps at which a new fit begins."""
    losses: list[float] = []
    rates: list[float] = []
    borders = []
    for fit in record.history:
        if losses:
            borders.append(len(losses))
        here = [math.nan if real(x) is None else float(x) for x in (fit or {}).get("loss") or []]
        rate = [real(x) for x in (fit or {}).get("lr") or []]
        losses += here
        rates += [x if x is not None and math.isfinite(x) else math.nan for x in rate[:len(here)]] + [math.nan] * (len(here) - len(rate))
    return losses, [] if all(math.isnan(x) for x in rates) else rates, [b for b in borders if b < len(losses)]


def held_out(record: Record) -> tuple[list[tuple[int, float]], dict[str, float]]:
    """Held-out points (step, value), none where there are fewer than two, and levels by stage; in nats where less is better, else in the metric."""
    metric = headline(record)
    if metric is None:
        return [], {}

    def judge(metrics: dict[str, Any] | None) -> float | None:
        return finite(nats(metrics or {}) if metric.lower else (metrics or {}).get(metric.name))

    last = max([len(steps(record)[0]), *(int(step) for step, _ in record.curve)])
    first, end = judge(record.scores.get(UNTRAINED)), judge(record.scores.get("trained"))
    points = [(0, first), *((int(step), judge(metrics)) for step, metrics in record.curve), (last, end)]
    found = sorted({step: x for step, x in points if x is not None}.items())
    levels = {FULL: judge(record.scores.get(FULL)), UNTRAINED: first}
    return found if len(found) > 1 else [], {name: x for name, x in levels.items() if x is not None}


def _thin(values: list[float]) -> tuple[list[float], list[float]]:
    """Steps (from 1) and values, as means of bins where there are more than POINTS: a page of a long run stays small."""
    wide = max(1, math.ceil(len(values) / POINTS))
    bins = [values[i:i + wide] for i in range(0, len(values), wide)]
    return [i * wide + (len(b) + 1) / 2 for i, b in enumerate(bins)], [sum(b) / len(b) for b in bins]


def _smooth(values: list[float]) -> list[float]:
    """A centred mean over a 25th of the run; what is not finite is left out."""
    half = len(values) // 50
    total, count = [0.0], [0]
    for x in values:
        total.append(total[-1] + (x if math.isfinite(x) else 0.0))
        count.append(count[-1] + math.isfinite(x))
    spans = [(max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values))]
    return [(total[b] - total[a]) / (count[b] - count[a]) if count[b] > count[a] else math.nan for a, b in spans]


def training_in_words(record: Record) -> str:
    losses = _smooth(steps(record)[0])
    points, levels = held_out(record)
    parts = [f"Training loss over {len(losses)} steps, from {number(losses[0])} to {number(losses[-1])}"] if losses else []
    parts += [f"held-out from {number(points[0][1])} at step {points[0][0]} to {number(points[-1][1])} at step {points[-1][0]}"] if points else []
    return "; ".join([*parts, *(f"{name} at {number(x)}" for name, x in levels.items())]) + "."
