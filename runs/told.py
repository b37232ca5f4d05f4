"""Several runs in one cell of a table: mean and spread over seeds."""

from __future__ import annotations

import statistics
from typing import Any


def told(values: list[float], digits: int = 2) -> str:
    """Mean and spread; of one run, its value."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


def means(runs: list[dict[str, Any]], *keys: str, digits: int = 2) -> list[str]:
    """Of each key that all runs have: mean and spread; else nothing."""
    return [told([run[key] for run in runs], digits) if all(key in run for run in runs) else "" for key in keys]
