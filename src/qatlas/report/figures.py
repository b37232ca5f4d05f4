"""The figures of a record, by name: "scores" and "sizes" (bars.py), "training" (curves.py), "errors" (depth.py).

A figure whose numbers the record lacks does not exist: `drawable` says which do. Values that are not finite are written in words, never drawn.
Colours are never alone: each mark has its name beside it, and each figure can be said in words (`describe`), which is its alternative text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

from ..core.error import RunError, unknown
from . import bars, curves, depth
from .svg import STYLE

if TYPE_CHECKING:
    from ..record import Record


def figure(record: Record, name: str) -> Figure:
    """One figure of a record: "scores", "training", "errors" or "sizes".

    Raises:
        RunError: no such figure, or a record without its numbers.
    """
    if name not in FIGURES:
        raise RunError(unknown("figure", name, FIGURES))
    if name not in drawable(record):
        raise RunError(f"the record of {record.paper!r} has no numbers for the figure {name!r}; it has: {', '.join(drawable(record)) or 'none'}")
    with matplotlib.rc_context(STYLE):
        return FIGURES[name][0](record)


def drawable(record: Record) -> list[str]:
    """The names of the figures that the record has numbers for, in the order of the page."""
    return [name for name, (_, has, _) in FIGURES.items() if has(record)]


def describe(record: Record, name: str) -> str:
    """A figure in words: what someone who does not see it should know."""
    return FIGURES[name][2](record)


def save_figures(record: Record, directory: str | Path) -> list[Path]:
    """directory/<name>.png for each figure that the record has numbers for, 150 dots an inch, on white."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in drawable(record):
        paths.append(folder / f"{name}.png")
        drawn = figure(record, name)
        with matplotlib.rc_context(STYLE):
            drawn.savefig(paths[-1], dpi=150, metadata={"Software": None})
    return paths


Part = tuple[Callable[["Record"], Figure], Callable[["Record"], bool], Callable[["Record"], str]]
FIGURES: dict[str, Part] = {
    "scores": (bars.scores, bars.has_scores, bars.scores_in_words),
    "training": (curves.training, curves.has_training, curves.training_in_words),
    "errors": (depth.errors, depth.has_errors, depth.errors_in_words),
    "sizes": (bars.sizes, bars.has_sizes, bars.sizes_in_words),
}
