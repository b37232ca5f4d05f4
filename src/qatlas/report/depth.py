"""The error of each layer's weight, |w - hard|^2 / |w|^2, before training (a ring) and after it (a disc), in depth order.

Up to LAYERS layers have a row each, under the heading of their block; with more, each block is one row that holds all its layers. Labels thin out
where even so there are more than ROWS rows.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .numbers import finite, number, plain
from .svg import HUGE, LIGHT, WIDTH

if TYPE_CHECKING:
    from ..record import Record

LAYERS, ROWS = 48, 60


def errors(record: Record) -> Figure:
    rows = _rows(pairs(record))
    fig = Figure(figsize=(WIDTH, 1.0 + min(0.19 * len(rows), 11.0)), layout="constrained")
    ax = fig.subplots()
    for y, (_, _, here) in enumerate(rows):
        shift = 0.17 if len(here) > 1 else 0.0
        if len(here) == 1:
            ax.plot(here[0], [y, y], color=LIGHT["full"], linewidth=0.9, zorder=1)
        ax.plot([b for b, _ in here], [y - shift] * len(here), "o", markersize=4.6, markerfacecolor=LIGHT["paper"], zorder=2, linestyle="none",
                markeredgecolor=LIGHT["untrained"], markeredgewidth=1.2, label="before training" if not ax.get_legend_handles_labels()[0] else None)
        ax.plot([a for _, a in here], [y + shift] * len(here), "o", markersize=4.6, color=LIGHT["trained"], zorder=3, linestyle="none",
                markeredgewidth=0, label="after training" if len(ax.get_legend_handles_labels()[0]) == 1 else None)
    step = math.ceil(len(rows) / ROWS)
    ax.set_yticks(range(0, len(rows), step), [plain(label, 40) for label, _, _ in rows[::step]], fontsize=8)
    for tick, (_, head, _) in zip(ax.get_yticklabels(), rows[::step], strict=True):
        tick.set(fontweight="bold" if head else "normal", color=LIGHT["ink"] if head else LIGHT["muted"])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    _scale(ax, [x for _, _, here in rows for pair in here for x in pair])
    ax.spines["left"].set_visible(False)
    ax.grid(axis="both")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2, handletextpad=0.2)
    return fig


def _scale(ax: Axes, values: list[float]) -> None:
    """From 0, or on a log axis where the errors differ by more than 30 times."""
    log = min(values) > 0 and max(values) / min(values) > 30
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.set_xlim(0, (max(values) or 1.0) * 1.06)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_xlabel(f"relative error of the weight, |w − ŵ|² / |w|²{', log scale' if log else ''}")


def pairs(record: Record) -> dict[str, tuple[float, float]]:
    found = {}
    for name, pair in record.errors.items():
        before, after = (finite(x) for x in pair)
        if before is not None and after is not None:
            found[name] = (min(before, HUGE), min(after, HUGE))
    return found


def _rows(found: dict[str, tuple[float, float]]) -> list[tuple[str, bool, list[tuple[float, float]]]]:
    """(label, whether it heads a block, pairs): a row a layer under its block's heading, or a row a block when there are many layers."""
    blocks: dict[str, dict[str, tuple[float, float]]] = {}
    for name, pair in found.items():
        match = re.match(r"(.*?\.\d+)\.(.+)", name)
        block, leaf = (match[1], match[2]) if match else ("", name)
        blocks.setdefault(block or leaf, {})[leaf if block else ""] = pair
    cut = _shared(list(blocks))
    if len(found) > LAYERS and len(blocks) < len(found):
        return [(block[cut:], False, list(layers.values())) for block, layers in blocks.items()]
    rows = []
    for block, layers in blocks.items():
        rows.append((block[cut:], True, [layers[""]] if "" in layers else []))
        rows += [(leaf, False, [pair]) for leaf, pair in layers.items() if leaf]
    return rows


def _shared(names: list[str]) -> int:
    """Length of the dotted prefix that all names share, but for its last word: model.layers.0, model.layers.1 -> len("model.").

    >>> _shared(["model.layers.0", "model.layers.1"]), _shared(["a.0", "b"])
    (6, 0)
    """
    words = [name.split(".") for name in names]
    same = 0
    while same < min(len(w) for w in words) - 1 and len({w[same] for w in words}) == 1:
        same += 1
    return sum(len(w) + 1 for w in words[0][:max(same - 1, 0)])


def has_errors(record: Record) -> bool:
    return bool(pairs(record))


def errors_in_words(record: Record) -> str:
    found = pairs(record)
    before, after = (sorted(p[i] for p in found.values())[len(found) // 2] for i in (0, 1))
    worst = max(found, key=lambda name: found[name][1])
    return (f"Relative weight error of {len(found)} layers in depth order: median {number(before)} before and {number(after)} after training; "
            f"largest after training {number(found[worst][1])} in {plain(worst)}.")
