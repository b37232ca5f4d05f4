"""Schedules: the factor on the learning rate as a pure function of progress.

Progress is the middle of the step as a part of the run, (step + 1/2) / steps, in (0, 1): so neither the first step of a warm-up nor the last of a
decay to zero is lost. A schedule is any function of it; those here are values, which resume points can compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.error import RunError
from ..core.noun import Noun


@dataclass(frozen=True)
class Schedule(Noun):
    """Rise from 0 to 1 during `warmup` (a part of the run), then go to `end`.

    >>> Schedule(warmup=0.5)(0.25), Schedule(warmup=0.5)(0.75)
    (0.5, 1.0)
    """

    warmup: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1:
            raise RunError(f"warmup={self.warmup}: a part of the run, from 0 to 1")

    def __call__(self, progress: float) -> float:
        if progress < self.warmup:
            return progress / self.warmup
        along = (progress - self.warmup) / max(1 - self.warmup, 1e-12)
        return self.end + (1 - self.end) * self.fall(min(along, 1.0))

    def fall(self, along: float) -> float:
        """From 1 at 0 to 0 at 1."""
        return 1.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine wave (Loshchilov and Hutter, SGDR, 2016, arXiv 1608.03983, without restarts)."""

    def fall(self, along: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * along))


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line."""

    def fall(self, along: float) -> float:
        return 1 - along


@dataclass(frozen=True)
class TwoStage(Linear):
    """A straight line whose height drops at once, at the part `at` of the run, to `second` of itself: a high rate while signs are found, a lower one
    while they settle. Source: BitNet b1.58's training tips (microsoft/unilm, bitnet)."""

    at: float = 0.5
    second: float = 2 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.at <= 1 and self.second > 0):
            raise RunError(f"TwoStage(at={self.at}, second={self.second}): the drop is at a part of the run, to a share above 0")

    def __call__(self, progress: float) -> float:
        return super().__call__(progress) * (self.second if progress >= self.at else 1.0)


def cosine(warmup: float = 0.0, end: float = 0.0) -> Schedule:
    """Rise during `warmup`, then half a cosine wave down to `end`.

    >>> round(cosine()(0.5), 6)
    0.5
    """
    return Cosine(warmup, end)


def linear(warmup: float = 0.0, end: float = 0.0) -> Schedule:
    """Rise during `warmup`, then a straight line down to `end`.

    >>> linear(end=0.5)(0.5)
    0.75
    """
    return Linear(warmup, end)


def two_stage(warmup: float = 0.0, end: float = 0.0, at: float = 0.5, second: float = 2 / 3) -> Schedule:
    """Rise during `warmup`, then a straight line down to `end`, from `at` on at `second` of its height.

    >>> round(two_stage(second=0.5)(0.5), 6)
    0.25
    """
    return TwoStage(warmup, end, at, second)


def constant(warmup: float = 0.0) -> Schedule:
    """Rise during `warmup`, then 1."""
    return Schedule(warmup, 1.0)
