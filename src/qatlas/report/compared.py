"""What a comparison looks like: a table in Markdown, a figure (quality against size, and against training time), and a page of one file.

    compared(trials, directory)     trials.json, table.md, comparison.png, report.html

The figure: one colour and one sign a paper, one point a bit-width, joined from few bits to many; the whisker is the 95 % interval over seeds where it
is larger than the sign. Perplexities stand on a log axis. The dashed line is full precision.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .numbers import METRICS, NOTHING, Metric, number, plain, seconds, size
from .svg import DARK, LIGHT, STYLE, svg

if TYPE_CHECKING:
    from ..trial import Trials

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31", "#444444")    # Okabe and Ito's, and three more
SIGNS = "osD^vP*X"
COLUMNS = ("quality", "beside", "sure", "untrained", "mean", "bytes", "seen", "seconds")      # seen: tokens or rows in all steps of all phases


def compared(trials: Trials, directory: Path) -> Path:
    """Write everything about a comparison; the path of the page."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "trials.json").write_text(json.dumps(trials.to_json(), indent=1), encoding="utf-8")
    (directory / "table.md").write_text(table(trials), encoding="utf-8")
    with matplotlib.rc_context(STYLE):
        drawn = picture(trials)
        drawn.savefig(directory / "comparison.png", dpi=150, metadata={"Software": None})
    return page([trials], directory / "report.html")


def table(trials: Trials) -> str:
    """Markdown: bits from many to few, papers in the order asked for."""
    beside = f"beside {trials.against}"
    lines = [f"| bits | paper | {trials.metric} | {beside} | sure | untrained | bits a weight | bytes | seen | training |", "|" + "---|" * 10,
             f"| 32 | full precision | {_metric(trials).say(trials.full.get(trials.metric))} | | | | 16 | {size(trials.full_bytes)} | | |"]
    for row in rows(trials):
        name = row["entry"] + (f" (has no {row['left']})" if row["left"] else "")
        lines.append("| " + " | ".join([row["bits"], name, *(row[key] for key in COLUMNS)]) + " |")
    return "\n".join(lines) + "\n"


def rows(trials: Trials) -> list[dict[str, str]]:
    """One row a bit-width and paper, as text."""
    metric, made = _metric(trials), []
    for bits in trials.bits:
        for entry in trials.entries:
            runs, refused = trials.of(entry, bits), trials.refusal(entry, bits)
            row = dict.fromkeys((*COLUMNS, "command", "left"), "")
            row |= {"bits": f"{bits:g}", "entry": plain(entry, 60)}
            if refused and not runs:
                made.append(row | {"quality": f"refused: {plain(refused.partition(': ')[2], 160)}"})
            elif runs:
                quality, first = trials.quality(entry, bits), runs[0]
                assert quality is not None
                start = [trials.score(run, "untrained") for run in runs]
                made.append(row | {
                    "quality": metric.say(quality.mean) + (f" ± {_spread(metric, quality)}" if quality.told else ""),
                    "beside": _beside(trials, entry, bits), "sure": trials.verdict(entry, bits),
                    "untrained": metric.say(sum(start) / len(start)) if all(map(math.isfinite, start)) else NOTHING,
                    "mean": number(round(first.mean, 2)), "bytes": size(first.bytes), "seen": f"{first.items:,}",
                    "seconds": seconds(min(run.seconds for run in runs)), "command": first.command, "left": ", ".join(first.left)})
    return made


def _spread(metric: Metric, quality: Any) -> str:
    half = (quality.high - quality.low) / 2
    return f"{100 * half:.2g}" if metric.share else f"{half:.2g}" if half < 1000 else number(half)


def _beside(trials: Trials, entry: str, bits: float) -> str:
    found = trials.beside(entry, bits)
    if found is None:
        return ""
    interval, better, n = found
    form = "{:.3f}" if trials.ratio else "{:+.3f}"
    ends = f" ({form.format(interval.low)} to {form.format(interval.high)})" if math.isfinite(interval.low) and interval.high < 1e3 else ""
    return f"{form.format(interval.mean)}{'×' if trials.ratio else ''}{ends}, better in {better} of {n}"


def _metric(trials: Trials) -> Metric:
    return next((m for m in METRICS if m.name == trials.metric), Metric(trials.metric, trials.lower))


def picture(trials: Trials) -> Figure:
    """Quality against bytes, and against seconds of training: the fastest seed's, since the work is the same and what is more was waiting."""
    entries = [e for e in trials.entries if any(trials.of(e, b) for b in trials.bits)]
    fig = Figure(figsize=(9.5, 4.2 + 0.16 * max(0, len(entries) - 12)), layout="constrained")
    axes = fig.subplots(1, 2, sharey=True)
    panels = (("bytes of the packed model", "bytes", size), ("seconds of training", "seconds", lambda x: f"{x:,.0f}"))
    for ax, (name, field, say) in zip(axes, panels, strict=True):
        for n, entry in enumerate(entries):
            _points(ax, trials, entry, field, COLORS[n % len(COLORS)], SIGNS[n % len(SIGNS)])
        _dress(ax, trials, name, say)
    axes[0].set_ylabel(f"{trials.metric}{', log scale' if trials.ratio else ''} ({'lower' if trials.lower else 'higher'} is better)")
    full = trials.full.get(trials.metric, math.nan)
    axes[0].annotate("full precision", (0, full), xycoords=("axes fraction", "data"), xytext=(4, 3), textcoords="offset points",
                     color=LIGHT["muted"], fontsize=8)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].xaxis.set_minor_locator(NullLocator())
    axes[0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: size(x)))
    axes[0].margins(x=0.2)
    _widths(axes[0], trials)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", handlelength=1.8)
    return fig


def _points(ax: Axes, trials: Trials, entry: str, field: str, color: str, sign: str) -> None:
    found = []
    for bits in trials.bits:
        runs, quality = trials.of(entry, bits), trials.quality(entry, bits)
        if runs and quality is not None and math.isfinite(quality.mean):
            found.append((bits, min(getattr(run, field) for run in runs), quality))
    if not found:
        return
    xs, ys = [x for _, x, _ in found], [q.mean for _, _, q in found]
    ax.plot(xs, ys, color=color, marker=sign, markersize=5, linewidth=1.1, label=plain(entry, 34), markeredgecolor=LIGHT["paper"],
            markeredgewidth=0.6)
    for x, (_, _, q) in zip(xs, found, strict=True):
        if math.isfinite(q.low):
            ax.plot([x, x], [max(q.low, q.mean / 20) if trials.ratio else q.low, q.high], color=color, linewidth=0.9, alpha=0.55)


def _widths(ax: Axes, trials: Trials) -> None:
    """The bits, once each, below the lowest point."""
    for bits in trials.bits:
        at = {e: q.mean for e in trials.entries if (q := trials.quality(e, bits)) is not None and math.isfinite(q.mean)}
        if at and bits < 32:
            lowest = min(at, key=lambda e: at[e])
            ax.annotate(f"{bits:g} bit{'s' * (bits != 1)}", (trials.of(lowest, bits)[0].bytes, at[lowest]), xytext=(-5, -9),
                        textcoords="offset points", ha="right", fontsize=8, color=LIGHT["ink"])


def _dress(ax: Axes, trials: Trials, name: str, say: Any) -> None:
    ax.grid(axis="y")
    ax.axhline(trials.full.get(trials.metric, math.nan), color=LIGHT["full"], linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
    if trials.ratio:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.3g}"))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:,.3g}") if _narrow(ax.get_ylim()) else NullFormatter())
        ax.margins(y=0.08)
    ax.set_xlabel(name)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: say(x) if x > 0 else "0"))


def _narrow(ends: tuple[float, float]) -> bool:
    low, high = ends
    return high / max(low, 1e-9) < 10


def page(several: Sequence[Trials], path: Path) -> Path:
    """One HTML file of one or several comparisons."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("compared.html").read_text(encoding="utf-8"))
    views = []
    for n, trials in enumerate(several):
        with matplotlib.rc_context(STYLE):
            drawn = svg(picture(trials), in_words(trials), f"c{n}")
        views.append({"trials": trials, "figure": drawn, "rows": rows(trials), "metric": _metric(trials),
                      "full": _metric(trials).say(trials.full.get(trials.metric)), "full_bytes": size(trials.full_bytes)})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(template.render(views=views, light=LIGHT, dark=DARK), encoding="utf-8")
    aside.replace(path)
    return path


def in_words(trials: Trials) -> str:
    """The figure for someone who does not see it."""
    told = [f"{row['entry']} at {row['bits']} bits {row['quality']}, {row['bytes']}" for row in rows(trials) if row["bytes"]]
    return f"{trials.metric} against size and training time: " + "; ".join(told) + "."
