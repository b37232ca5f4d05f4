"""What a fit would cost, from a few steps that are really taken.

A `Run` whose `plan` is a list trains nothing to its end: each fit takes `TRIED` steps, with its own losses, tactics and optimizer, notes its `Cost`
in the list, and the paper goes on to its next phase. So a plan sees every phase that a paper has, and what each needs. The model is spoilt.

The first step is dearer than the others (buffers are made, threads wake); the others are taken at their mean. What changes with the progress of a
phase, as a tactic that acts in its second half, is not seen. runs/plan_check.py holds plans against runs: docs/results.md#plans.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .tactic import History

TRIED = 6


@dataclass(frozen=True)
class Cost:
    """Of one fit: optimizer steps, items (tokens, rows) they see, seconds of the first step and of any other.

    >>> Cost(10, 640, 3.0, 2.0).seconds
    21.0
    """

    steps: int
    tokens: int
    first: float
    each: float

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.first + (self.steps - 1) * self.each


def cost(tried: History, steps: int) -> Cost:
    """The cost of so many steps, of which some were tried.

    >>> cost(History(seconds=[3.0, 2.0, 1.0], tokens=[64, 64, 64]), steps=10)
    Cost(steps=10, tokens=640, first=3.0, each=1.5)
    """
    first, *others = tried.seconds
    return Cost(steps, round(statistics.fmean(tried.tokens) * steps), first, statistics.fmean(others) if others else first)
