"""What came out of runs/teacher_intervention.py: tables, figures (teacher_intervention_figures.py) and the section of docs/results.md.

    python runs/teacher_intervention_table.py --out DIR [--figures docs/figures] [--page docs/results.md]        prints the section
    python runs/pages.py                                                   afterwards: the paper's page shows the figures that are there

It takes the runs that are in DIR and says which are missing. Comparisons are of runs with the same seed, which see the same batches in one order:

    to plain          loss of imitation on held-out data, divided by plain's; the mean over seeds
    steps, seconds    where a run's held-out curve first is at or below plain's last value, on a line between the points of the curve. The last step
                      is a point, too; its seconds go on at the pace of the last two points. Seconds are CPU seconds of the training steps alone
    below             in how many seeds the loss is lower. "Beats" is: in all of them
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pages import between
from teacher_intervention_figures import save
from teacher_intervention_runs import NONE, SEEDS, Runs, arrivals, curve, missing, number, pairs, ratio, read, setting, spread, wins

MARK = "teacher-intervention"
MODELS = {"cola": "MiniLM-L6", "sst2": "MiniLM-L6", "rte": "MiniLM-L6", "vit": "CIFAR-10 ViT", "vit_token": "CIFAR-10 ViT, inputs' scale per token",
          "stories": "stories260K, a Llama"}


def scored(metric: str) -> Callable[[float], str]:
    """How a metric is written."""
    return {"accuracy": lambda x: f"{100 * x:.1f} %", "matthews": lambda x: f"{x:.3f}"}.get(metric, number)


def late(found: list[tuple[float, float, bool]], of: int, which: int) -> str:
    """Steps (0) or seconds (1) to plain's last loss."""
    if not found:
        return "not reached" if of else NONE
    mean = f"{'at most ' * any(at[2] for at in found)}{statistics.fmean(at[which] for at in found):,.0f}"
    return mean if len(found) == of else f"{mean} ({len(found)} of {of} seeds)"


def table(rows: dict[str, dict[int, Any]], seeds: Sequence[int] = SEEDS) -> str:
    """One task's table."""
    metric = setting(rows, "metric")
    say, guide = scored(metric), next((run["teacher"][metric] for run in rows["plain"].values() if run.get("teacher")), None)
    head = [f"{metric}" + (f" (teacher {say(guide)})" if guide is not None else ""), "held-out loss", "to plain", "last block's MSE", "sharpness",
            "steps to plain's loss", "CPU s to plain's loss", "below plain", "below restart"]
    lines = ["| | seeds | " + " | ".join(head) + " |", "|---" * (len(head) + 2) + "|"]
    for row, runs in rows.items():
        at, of = arrivals(rows, row)
        sharp = runs.get(0, {}).get("sharpness")
        both = [pairs(rows, row, other) if row != other else [] for other in ("plain", "restart")]
        against = [f"{wins(found)} of {len(found)}" if found else NONE for found in both]
        held = "none" if not runs else str(len(runs)) if set(runs) >= set(seeds) else f"{len(runs)} ({', '.join(map(str, sorted(runs)))})"
        plain = pairs(rows, row, "plain")
        lines.append("| " + " | ".join([
            row, held, spread([run["scores"][metric] for run in runs.values()], say), spread([run["loss"] for run in runs.values()]),
            f"{ratio(plain):.3f}" if plain else NONE, spread([run["depth"][-1] for run in runs.values() if run.get("depth")]),
            number(sharp) if sharp is not None else NONE, late(at, of, 0), late(at, of, 1), *against]) + " |")
    return "\n".join(lines) + "\n"


def verdict(rows: dict[str, dict[int, Any]], other: str, row: str = "TI-G") -> str:
    """Whether one row beats another, in words."""
    both = pairs(rows, row, other)
    if not both:
        return f"Whether {row} beats {other} is open: no seed has both."
    change, n = 100 * (ratio(both) - 1), len(both)
    how = f"lower in {wins(both)} of {n} seed{'s' * (n > 1)}, {change:+.1f} % on average" if math.isfinite(change) else "not finite in every run"
    if n > 1 and wins(both) == n:
        return f"{row} beats {other} (held-out loss {how})."
    if n > 1 and not wins(both):
        return f"{row} does not beat {other} (held-out loss {how})."
    return f"Whether {row} beats {other} is not clear (held-out loss {how})."


def summary(task: str, rows: dict[str, dict[int, Any]]) -> str:
    """One task in a line of words."""
    metric = setting(rows, "metric")
    scores = {run["scores"][metric] for of in rows.values() for run in of.values()}
    words = f"- `{task}`: {verdict(rows, 'plain')} {verdict(rows, 'restart')}"
    if len(scores) == 1 < sum(map(len, rows.values())):
        words += f" Every run has the same {metric}, {scored(metric)(scores.pop())}: it tells nothing here."
    return words


def fewer(rows: dict[str, dict[int, Any]], row: str) -> str:
    """How much sooner a row is at plain's last loss, in words."""
    found, of = arrivals(rows, row)
    if not found:
        return f"{row} does not reach plain's last held-out loss in any of {of} seeds" if of else f"of {row} there is no run to compare with plain"
    steps, seconds = (statistics.fmean(at[i] for at in found) for i in (0, 1))
    whole, paid = setting(rows, "steps"), statistics.fmean(curve(run)[-1][1] for run in rows["plain"].values())
    where = "" if len(found) == of else f" in {len(found)} of {of} seeds"
    return (f"{row} reaches plain's last held-out loss{where} after {'at most ' * any(at[2] for at in found)}{steps:,.0f} of {whole} steps and "
            f"{seconds:,.0f} CPU seconds, of {paid:,.0f} of plain's whole run (steps {whole / steps:.2f}x, seconds {paid / seconds:.2f}x)")


def split(runs: Runs, value: Callable[[dict[str, Any]], float | None]) -> str:
    """On which tasks a number of TI-G's is lower than plain's, mean over the seeds that both have."""
    low, high = [], []
    for task, rows in runs.items():
        both = [(value(rows["TI-G"][s]), value(rows["plain"][s])) for s in rows["TI-G"] if s in rows["plain"]]
        both = [pair for pair in both if None not in pair]
        if both:
            (low if sum(a for a, _ in both) < sum(b for _, b in both) else high).append(task)
    return f"lower than plain's on {', '.join(low) or 'no task'}; not lower on {', '.join(high) or 'no task'}" if low or high else "not measured"


def claims(runs: Runs) -> str:
    """What the paper says, beside what came out."""
    cola = "; ".join(fewer(runs["cola"], row) for row in ("TI-G", "restart")) if "cola" in runs else "cola was not run"
    beaten = {other: [task for task, rows in runs.items() if len(both := pairs(rows, "TI-G", other)) > 1 and wins(both) == len(both)]
              for other in ("plain", "restart")}
    last, sharp = split(runs, lambda run: (run.get("depth") or [None])[-1]), split(runs, lambda run: size(run.get("sharpness")))
    lower = [", ".join(beaten[other]) or "no task" for other in ("plain", "restart")]
    return "\n".join([
        "| the paper (ternary weights, 8-bit inputs) | here |", "|---|---|",
        "| up to 12.5x less fine-tuning time on CoLA for an equal score (BERT, about 1,600 steps) | "
        f"to an equal held-out loss, on cola: {cola} |",
        "| TI-G ends better than plain distillation in the same number of steps | "
        f"held-out loss lower than plain's in every seed of two or more: {lower[0]}; lower than restart's, a control that is ours: {lower[1]} |",
        f"| the error of the layers' outputs grows less with the depth | MSE of the last block, mean over seeds: {last} |",
        f"| a flatter loss (eigenvalues of the Hessian) | size of the largest eigenvalue, seed 0: {sharp} |"]) + "\n"


def size(x: float | None) -> float | None:
    return None if x is None else abs(x)


def settings(runs: Runs) -> str:
    lines = ["| task | model | steps | of these the first part | learning rate | batch |", "|---|---|---|---|---|---|"]
    for task, rows in runs.items():
        steps, first, lr, batch = (setting(rows, key) for key in ("steps", "first", "lr", "batch"))
        lines.append(f"| {task} | {MODELS[task]} | {steps} | {NONE if first is None else first} | {lr:g} | {batch} |")
    return "\n".join(lines) + "\n"


TRIED = """Learning rates that were tried, judged by plain's held-out loss after all steps of seed 0: MiniLM on cola, 80 steps: 6.23 at 1e-4, 5.66
at 2e-4, 6.16 at 5e-4 (sst2 and rte take cola's); vit, 100 steps: 3.17 at 2e-4, 3.25 at 5e-4 (vit_token takes vit's); stories, 60 steps: 120.4 at
1e-3, 127.9 at 3e-3. For vit and stories the lower of two won: the best may lie below. No other row's rate was tuned, which favours plain.
"""
SETTING = """A fine-tuned full-precision model is teacher and start; ternary weights, 8-bit inputs. All rows of a task have the same losses (those of
Teacher Intervention), steps, and, seed by seed, the same batches in the same order. `plain` is one schedule over all steps. `restart` is the boring
control: learning rate and optimizer start anew after the first part, as in TI, but the teacher never intervenes. `TI-O`, `TI-M` and `TI-G` have it
intervene in the first part: at the attention's output, at its map, gradually from one to the other.

Held-out loss is the loss of imitation without intervention on 128 rows of the development set, 256 images or 32 windows of text. Scores are of the
whole development set, of 2,000 test images, or the perplexity per token on five real stories. Spread is the standard deviation over seeds, which
differ in the order of data and in dropout, where the model has any. CPU seconds are those of training steps on one thread, the teacher's work
included, on a machine of two cores on which other tasks of this experiment ran. Steps and seconds to plain's last
loss are read from curves with a point each sixth of the run, straight between them, and with a schedule made for all steps: a shorter schedule may
be there sooner, for any row.
"""


def section(runs: Runs, command: str, pictures: Sequence[tuple[str, str]] = (), seeds: Sequence[int] = SEEDS) -> str:
    """The section of the page. pictures: (link, alternative text)."""
    lacks = missing(runs, seeds)
    n = max(len(of) for rows in runs.values() for of in rows.values())
    chance = (f"With {n} seeds, of two rows that are equally good one is lower than the other in every seed by chance in one of {2 ** n} cases.\n"
              if n > 1 else "One seed: no spread is known.\n")
    return "\n".join([
        "## Teacher Intervention\n", f"`{command}`, from runs of `runs/teacher_intervention.py`.\n", SETTING, settings(runs), TRIED,
        *([f"Runs that are missing: {lacks}.\n"] if lacks else []), *(summary(task, rows) for task, rows in runs.items()), "", chance, claims(runs),
        *(f"### {task}\n\n{table(rows, seeds)}" for task, rows in runs.items()), *(f"![{words}]({link})\n" for link, words in pictures)])


def write(page: Path, made: str) -> None:
    """The section between its markers; at the page's end where it has none."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if f"<!-- {MARK} -->\n" not in text:
        text = f"{text.rstrip()}\n\n<!-- {MARK} -->\n<!-- /{MARK} -->\n".lstrip()
    page.write_text(between(text, MARK, made), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="the folder of the runs")
    parser.add_argument("--figures", type=Path, help="a folder for the figures; without it none are drawn")
    parser.add_argument("--page", type=Path, help="the page that gets the section; without it the section is only printed")
    given = parser.parse_args(arguments)
    runs, pictures = read(given.out), []
    if given.figures:
        beside = given.page.parent if given.page else Path()
        pictures = [(Path(os.path.relpath(path, beside)).as_posix(), words) for path, words in save(runs, given.figures)]
    command = "python runs/teacher_intervention_table.py --out DIR" + "".join(
        f" --{name} docs/{end}" for name, end in (("figures", "figures"), ("page", "results.md")) if getattr(given, name))
    made = section(runs, command, pictures)
    if given.page:
        write(given.page, made)
    print(made)
    return made


if __name__ == "__main__":
    main()
