"""Trial, one paper once on a task, and Trials, many of them under equal conditions: means, intervals, and how sure a difference is.

Numbers of few seeds are few numbers, so intervals are Student's, and two papers are compared seed by seed (same data order, same start): of n paired
differences d the mean and its 95 % interval, mean ± t s / sqrt(n). For a perplexity the differences are those of its logarithm, so what is told is a
ratio; for all else it is a difference. A comparison is sure where the interval leaves the equal out, and says nothing more than that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)    # 97.5 %, of 1 to 10 degrees of freedom


@dataclass(frozen=True)
class Trial:
    """One run: `entry` as it was asked for ("lsq", "lsq:distil=true"), bits, seed, and what came out.

    scores: stage -> metrics, "untrained" and "trained". mean: bits a weight with all that stays full. bytes: of the packed model. seconds: of
    training, all steps at the median's time. items: tokens or rows seen. left: arguments meant for all that this paper does not have. refused: why
    it was not run.
    """

    entry: str
    bits: float
    seed: int
    command: str
    paper: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    mean: float = 32.0
    bytes: int = 0
    seconds: float = 0.0
    steps: int = 0
    items: int = 0
    left: tuple[str, ...] = ()
    refused: str = ""


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval; of one number the ends are infinitely far.

    >>> Interval.of([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.484..., high=4.484...)
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's, of the mean."""
        n, mean = len(values), statistics.fmean(values)
        if n < 2 or not math.isfinite(mean):
            return cls(mean, -math.inf, math.inf)
        t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96 + 2.7 / (n - 1)         # the second is a little too long
        half = t * statistics.stdev(values) / math.sqrt(n)
        return cls(mean, mean - half, mean + half)

    @property
    def told(self) -> str:
        """Half its length, as after a ±; nothing where it is infinite."""
        return "" if math.isinf(self.high) else f"{(self.high - self.low) / 2:.2g}"


@dataclass
class Trials:
    """All runs of a comparison on one model. metric: its name; lower: less is better. full: metrics of the full-precision model. against: the entry
    that others are held against."""

    model: str
    data: str
    metric: str
    lower: bool
    full: dict[str, float]
    full_bytes: int
    against: str
    command: str = ""
    trials: list[Trial] = field(default_factory=list)
    claims: dict[str, str] = field(default_factory=dict)

    @property
    def entries(self) -> list[str]:
        """In the order in which they were asked for."""
        return list(dict.fromkeys(trial.entry for trial in self.trials))

    @property
    def bits(self) -> list[float]:
        """From many to few."""
        return sorted({trial.bits for trial in self.trials}, reverse=True)

    def of(self, entry: str, bits: float) -> list[Trial]:
        """The runs of an entry that came to an end, by seed."""
        return sorted((t for t in self.trials if t.entry == entry and t.bits == bits and not t.refused), key=lambda t: t.seed)

    def refusal(self, entry: str, bits: float) -> str:
        """Why there is no run; nothing where there is one."""
        return next((t.refused for t in self.trials if t.entry == entry and t.bits == bits and t.refused), "")

    def score(self, trial: Trial, stage: str = "trained") -> float:
        """A run's score; not a number where there is none."""
        return trial.scores.get(stage, {}).get(self.metric, math.nan)

    def quality(self, entry: str, bits: float) -> Interval | None:
        """Of the score over seeds."""
        runs = self.of(entry, bits)
        return Interval.of([self.score(run) for run in runs]) if runs else None

    def beside(self, entry: str, bits: float) -> tuple[Interval, int, int] | None:
        """Beside the entry `against`, paired by seed: the ratio (perplexity) or difference, in how many seeds it is better, and of how many."""
        theirs = {run.seed: self.score(run) for run in self.of(self.against, bits)}
        pairs = [(self.score(run), theirs[run.seed]) for run in self.of(entry, bits) if run.seed in theirs]
        if not pairs or entry == self.against or not all(math.isfinite(a) and math.isfinite(b) for a, b in pairs):
            return None
        better = sum((a < b) if self.lower else (a > b) for a, b in pairs)
        if not self.ratio:
            return Interval.of([a - b for a, b in pairs]), better, len(pairs)
        logs = Interval.of([math.log(a / b) for a, b in pairs])
        return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(min(logs.high, 700))), better, len(pairs)

    @property
    def ratio(self) -> bool:
        """Whether differences are told as ratios."""
        return self.metric == "perplexity"

    def verdict(self, entry: str, bits: float) -> str:
        """"better" or "worse" than `against` where that is sure, "open" where it is not, nothing where nothing was compared."""
        found = self.beside(entry, bits)
        if found is None:
            return ""
        interval, even = found[0], 1.0 if self.ratio else 0.0
        if interval.low <= even <= interval.high:
            return "open"
        return "better" if (interval.mean < even) == self.lower else "worse"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Trials:
        """The inverse."""
        trials = [Trial(**{**row, "left": tuple(row.get("left", ()))}) for row in given.get("trials", ())]
        return cls(**{**given, "trials": trials})
