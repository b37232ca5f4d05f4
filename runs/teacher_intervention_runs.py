"""Runs of runs/teacher_intervention.py as numbers: read from a folder, held against each other, and written for people.

See teacher_intervention_table.py for what each number is.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from teacher_intervention import ROWS, SETTINGS

from qatlas.core.error import RunError

SEEDS = (0, 1, 2)
NONE = "–"
Runs = dict[str, dict[str, dict[int, Any]]]                       # task -> row -> seed -> what the run's JSON says


# ---- runs and numbers ----

def read(folder: Path) -> Runs:
    """The runs of a folder.

    Raises:
        RunError: no runs; a file whose name is not that of its run; runs of one task that were not made alike.
    """
    runs: Runs = {task: {row: {} for row in ROWS} for task in SETTINGS}
    files = sorted(folder.glob("*.json"))
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        task, row, seed = (found.get(key) for key in ("task", "row", "seed"))
        if task not in SETTINGS or row not in ROWS or file.name != f"{task}-{seed}-{row}.json":
            raise RunError(f"{file} holds task {task!r}, row {row!r}, seed {seed!r}: give a folder with nothing but runs of teacher_intervention.py")
        runs[task][row][seed] = found
    if not files:
        raise RunError(f"no runs in {folder}: python runs/teacher_intervention.py --task cola --teacher DIR --out {folder} makes the first")
    for task, rows in runs.items():
        for key in ("steps", "lr", "batch", "metric", "first"):
            seen = {str(run[key]): f"{task}-{seed}-{row}.json" for row, of in rows.items() for seed, run in of.items()
                    if (key, row) != ("first", "plain")}
            if len(seen) > 1:
                raise RunError(f"runs of {task} with different {key}: {seen}. Remove those of another setting from {folder}")
    return {task: rows for task, rows in runs.items() if any(rows.values())}


def setting(rows: dict[str, dict[int, Any]], key: str) -> Any:
    """What all runs of a task share; `first` is not plain's."""
    found = [run[key] for row, of in rows.items() for run in of.values() if (key, row) != ("first", "plain")]
    return found[0] if found else None


def missing(runs: Runs, seeds: Sequence[int] = SEEDS) -> str:
    """The runs that are not there, in words; empty if none."""
    parts = []
    for task in SETTINGS:
        lacks = {row: [str(s) for s in seeds if s not in runs.get(task, {}).get(row, {})] for row in ROWS}
        if all(len(found) == len(seeds) for found in lacks.values()):
            parts.append(f"{task}: all")
        elif any(lacks.values()):
            parts.append(f"{task}: " + ", ".join(f"{row} (seed {', '.join(found)})" for row, found in lacks.items() if found))
    return "; ".join(parts)


def curve(run: dict[str, Any]) -> list[tuple[int, float, float]]:
    """(step, seconds, held-out loss), the last step added where the curve ends before it."""
    points = [(int(step), float(seconds), float(loss)) for step, seconds, loss in run["curve"]]
    if points and points[-1][0] < run["steps"]:
        (before, began, _), (step, seconds, _) = points[-2] if len(points) > 1 else (0, 0.0, 0.0), points[-1]
        points.append((run["steps"], seconds + (seconds - began) / (step - before) * (run["steps"] - step), float(run["loss"])))
    return points


def reached(run: dict[str, Any], target: float) -> tuple[float, float, bool] | None:
    """Steps and CPU seconds until the held-out loss first is at or below a target; whether it was so at the curve's first point; None if never."""
    points = curve(run)
    for i, (step, seconds, loss) in enumerate(points):
        if loss <= target:
            if not i or not math.isfinite(points[i - 1][2]):
                return step, seconds, not i
            before, began, higher = points[i - 1]
            share = (higher - target) / (higher - loss)
            return before + share * (step - before), began + share * (seconds - began), False
    return None


def pairs(rows: dict[str, dict[int, Any]], row: str, other: str) -> list[tuple[float, float]]:
    """The losses of two rows, for each seed that both have."""
    return [(run["loss"], rows[other][seed]["loss"]) for seed, run in sorted(rows[row].items()) if seed in rows[other]]


def wins(found: list[tuple[float, float]]) -> int:
    return sum(ours < theirs for ours, theirs in found)


def ratio(found: list[tuple[float, float]]) -> float:
    return statistics.fmean(ours / theirs for ours, theirs in found) if found else math.nan


def arrivals(rows: dict[str, dict[int, Any]], row: str) -> tuple[list[tuple[float, float, bool]], int]:
    """When the runs of a row reached plain's last loss, those that did; and how many could have."""
    found = [reached(run, rows["plain"][seed]["loss"]) for seed, run in sorted(rows[row].items()) if seed in rows["plain"]]
    return [at for at in found if at], len(found)


def number(x: float, digits: int = 4) -> str:
    """Four digits, never as a power of ten.

    >>> number(5.66388), number(0.05123), number(120.44), number(12345.6), number(0.0)
    ('5.664', '0.0512', '120.4', '12,346', '0')
    """
    if not math.isfinite(x):
        return "not finite"
    return f"{x:,.{min(max(digits - 1 - math.floor(math.log10(abs(x))), 0), 4)}f}" if x else "0"


def spread(values: Sequence[float], say: Callable[[float], str] = number) -> str:
    """Mean and standard deviation (n - 1); the deviation has the decimals of the mean.

    >>> spread([1.0, 1.1, 1.2]), spread([2.0]), spread([])
    ('1.100 ± 0.100', '2.000', '–')
    """
    if not values:
        return NONE
    mean = say(statistics.fmean(values))
    if len(values) < 2 or mean == "not finite":
        return mean
    decimals = len(mean.rstrip(" %").partition(".")[2])
    scale = 100 if mean.endswith("%") else 1
    return f"{mean.rstrip(' %')} ± {scale * statistics.stdev(values):.{decimals}f}" + (" %" if scale == 100 else "")
