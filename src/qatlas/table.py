"""What the command line prints: scores, proofs and plans as plain tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .record import Record
    from .trial import Trials

METRICS = ("perplexity", "accuracy", "pearson")
SAID = {"untrained": "rounded, untrained"}                        # stage -> how people are told
MADE = {True: "yes", False: "NO", None: "not made"}


def scores(record: Record) -> None:
    """Stages with their score, bytes, steps and seconds."""
    from rich.console import Console
    from rich.table import Table

    metric = next((m for m in METRICS if any(m in score for score in record.scores.values())), "loss")
    title = f"{record.paper} on {record.model}, {record.bits:.2f} bits a weight on average"
    spent = f"{sum(record.times.values()):,.0f} seconds in all"
    caption = f"{spent}, at most {record.peak_memory / 2**20:,.0f} MiB of memory" if record.peak_memory else spent
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in ("", metric, "bytes", "steps", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    steps = sum(len(history["loss"]) for history in record.history)
    for stage in dict.fromkeys([*record.scores, *record.sizes]):
        score, size, seconds = record.scores.get(stage, {}).get(metric), record.sizes.get(stage), record.times.get(stage)
        table.add_row(SAID.get(stage, stage), _number(score, metric), "" if size is None else f"{size:,}", str(steps) if stage == "trained" else "",
                      "" if seconds is None else f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}")
    Console().print(table)


def _number(score: float | None, metric: str) -> str:
    if score is None:
        return ""
    return f"{score:,.2f}" if metric == "perplexity" and score < 1e6 else f"{score:.4g}"


def proofs(found: list[dict[str, Any]]) -> None:
    """One line a proof."""
    for proof in found:
        print(f"  {MADE[proof['passed']]:8} {proof['claim']} [{proof['reader']}]: {proof['result']}")


def plan(found: dict[str, Any]) -> None:
    """The coverage, one line a matrix and one a signal inside attention, then what the run would cost."""
    rows, signals = found["coverage"], found["signals"]
    wide = max((len(name) for name in (*(row["name"] for row in rows), *(signal["address"] for signal in signals))), default=0)
    for row in rows:
        print(f"{row['name']:{wide}}  {row['layer']:12} {'x'.join(map(str, row['shape'])):12} {row['weight']:14} input {row['input']}")
    for signal in signals:
        print(f"{signal['address']:{wide}}  {'signal':12} {'':12} {signal['quant']}")
    for name, value in found.items():
        if name not in ("coverage", "signals"):
            print(f"{name:16} {_said(name, value)}")


def _said(name: str, value: Any) -> str:
    if name == "peak memory":
        return f"{value / 2**20:,.0f} MiB"
    if name in ("training", "judging", "seconds"):
        return f"{value:,.0f} s"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def benchmarks(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Directory -> task -> metric -> value: one row a task and metric, the directories side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("task", "metric", *found):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", overflow="fold")
    rows = dict.fromkeys((task, metric) for scores in found.values() for task, mine in scores.items() for metric in mine if not metric.endswith("±"))
    for task, metric in rows:
        cells = []
        for scores in found.values():
            value, error = (scores.get(task, {}).get(name) for name in (metric, f"{metric} ±"))
            cells.append(("" if value is None else f"{value:.4g}") + (f" ± {error:.2g}" if error else ""))
        table.add_row(task, metric, *cells)
    Console().print(table)


def compared(found: Trials) -> None:
    """A comparison: one row a bit-width and paper."""
    from rich.console import Console
    from rich.table import Table

    from .report.compared import rows

    table = Table(title=f"{found.model} on {found.data}, {found.metric} in full precision {found.full[found.metric]:.4g}", title_justify="left")
    for column in ("bits", "paper", found.metric, f"beside {found.against}", "sure", "bytes", "training"):
        table.add_column(column, justify="right" if column in ("bits", "bytes", "training") else "left", overflow="fold")
    for row in rows(found):
        table.add_row(*(row[key] for key in ("bits", "entry", "quality", "beside", "sure", "bytes", "seconds")))
    Console().print(table)


def bench(found: dict[str, Any]) -> None:
    """What a model does in a second, form by form."""
    from rich.console import Console
    from rich.table import Table

    how = found["setting"]
    title = f"{found['directory']}, threads: {how['threads']}, medians of {how['repeats']}; memory reads {how['bandwidth'] / 1e9:.1f} GB/s"
    table = Table(title=title, title_justify="left", caption="tokens a second of a prompt of {prompt}, and of {tokens} after it".format(**how))
    for column in ("", "prefill", "decode", "limit", "peak MiB", "file MiB", "load s"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for row in found["rows"]:
        if "absent" in row:
            table.add_row(row["name"], *[""] * 6)
            continue
        limit = "" if row["limit"] is None else f"{row['limit']:,.0f}"
        sizes = (f"{row[key] / 2**20:,.0f}" for key in ("peak", "file"))
        table.add_row(row["name"], f"{row['prefill']:,.0f}", f"{row['decode']:,.1f}", limit, *sizes, f"{row['load']:.2f}")
    Console().print(table)
    for row in found["rows"]:
        for line in [f"absent, {row['absent']}"] if "absent" in row else row["routes"]:
            print(f"  {row['name']}: {line}")


def pairs(found: dict[str, Any]) -> None:
    """Names and values."""
    wide = max((len(name) for name in found), default=0) + 1
    for name, value in found.items():
        print(f"{name:{wide}} {value:.6g}" if isinstance(value, float) else f"{name:{wide}} {value}")
